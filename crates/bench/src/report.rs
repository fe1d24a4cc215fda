//! What was measured: a table for people, JSON for machines.

use std::fmt::Display;

use anyhow::Context as _;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde_json::{Map, Value, json};

/// Whether more or less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// More is.
    More,
    /// Less is.
    Less,
}

/// What a figure must be, and what it should be.
#[derive(Debug)]
pub struct Aim {
    /// The figure.
    key: &'static str,
    /// For a figure of several: which one.
    of: Option<&'static str>,
    what: &'static str,
    floor: f64,
    goal: f64,
    better: Better,
}

/// An aim for a figure, called `what` in the table.
#[must_use]
pub const fn aim(key: &'static str, what: &'static str, floor: f64, goal: f64, better: Better) -> Aim {
    Aim { key, of: None, what, floor, goal, better }
}

/// An aim for one of several values of a figure.
#[must_use]
pub const fn aim_of(
    key: &'static str,
    of: &'static str,
    what: &'static str,
    floor: f64,
    goal: f64,
    better: Better,
) -> Aim {
    Aim { key, of: Some(of), what, floor, goal, better }
}

/// Figures by name.
#[derive(Debug)]
pub struct Report {
    aims: &'static [Aim],
    figures: Map<String, Value>,
}

impl Report {
    /// Without figures yet.
    #[must_use]
    pub fn new(aims: &'static [Aim]) -> Self {
        Self { aims, figures: Map::new() }
    }

    /// Sets a figure.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.figures.insert(key.to_owned(), rounded(value.into()));
    }

    /// Sets one of several values of a figure.
    pub fn set_of(&mut self, key: &str, of: impl Display, value: impl Into<Value>) {
        let several = self.figures.entry(key).or_insert_with(|| json!({}));
        if let Value::Object(several) = several {
            several.insert(format!("{of}"), rounded(value.into()));
        }
    }

    /// Checks that these figures are set.
    ///
    /// # Errors
    /// Some are not.
    pub fn check<'a>(&self, keys: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
        let missing: Vec<&str> = keys.filter(|key| !self.figures.contains_key(*key)).collect();
        anyhow::ensure!(missing.is_empty(), "not measured, though asked for: {}", missing.join(", "));
        Ok(())
    }

    /// As JSON, on one line.
    ///
    /// # Errors
    /// A figure that JSON has no form for.
    pub fn json(&self) -> anyhow::Result<String> {
        serde_json::to_string(&self.figures).context("the report cannot be written as JSON")
    }

    fn number(&self, key: &str, of: Option<&str>) -> Option<f64> {
        let figure = self.figures.get(key)?;
        of.map_or(Some(figure), |of| figure.get(of))?.as_f64()
    }

    /// Figures with an aim first, then all other numbers.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(["figure", "measured", "floor", "goal", "verdict"]);
        for aim in self.aims {
            if let Some(measured) = self.number(aim.key, aim.of) {
                let verdict = aim.verdict(measured).to_owned();
                table.add_row([
                    aim.what.to_owned(),
                    shown(measured),
                    shown(aim.floor),
                    shown(aim.goal),
                    verdict,
                ]);
            }
        }
        for (key, figure) in &self.figures {
            let mut row = |name: String, of: Option<&str>| {
                let aimed = self.aims.iter().any(|aim| aim.key == key && aim.of == of);
                if let Some(measured) = self.number(key, of).filter(|_| !aimed) {
                    table.add_row([name, shown(measured), String::new(), String::new(), String::new()]);
                }
            };
            match figure {
                Value::Object(several) => several.keys().for_each(|of| row(format!("{key} {of}"), Some(of))),
                _ => row(key.clone(), None),
            }
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

impl Aim {
    fn verdict(&self, measured: f64) -> &'static str {
        let reaches = |wanted: f64| match self.better {
            Better::More => measured >= wanted,
            Better::Less => measured <= wanted,
        };
        if reaches(self.goal) {
            "goal"
        } else if reaches(self.floor) {
            "floor"
        } else {
            "below the floor"
        }
    }
}

/// The middle one; of an even number, the upper of the two in the middle.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Digits beyond the fourth of a measurement say nothing.
fn rounded(value: Value) -> Value {
    let Some(number) = value.as_f64().filter(|_| value.is_f64()) else { return value };
    if number.abs() >= 1_000.0 {
        json!(number.round())
    } else {
        json!((number * 10_000.0).round() / 10_000.0)
    }
}

fn shown(number: f64) -> String {
    if number.abs() < 1_000.0 {
        return number.to_string();
    }
    let digits = format!("{number:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_held_against_its_aim() {
        const AIMS: &[Aim] = &[
            aim_of("appends_per_s", "256", "appends/s, 256 callers", 15_000.0, 25_000.0, Better::More),
            aim("p99_ms_at_5000", "p99 at 5,000/s, ms", 20.0, 10.0, Better::Less),
            aim("conflict_loss", "loss with 20 % conflicts", 0.2, 0.1, Better::Less),
        ];
        let mut report = Report::new(AIMS);
        report.set_of("appends_per_s", 256, 20_123.456);
        report.set_of("appends_per_s", 1, 812.0);
        report.set("conflict_loss", 0.051_234_5);
        report.set("p99_ms_at_5000", 21.5);
        report.set("seed", 7);
        let table = report.table();
        let line = |start: &str| {
            let line = table.lines().find(|line| line.starts_with(start)).unwrap();
            line.strip_prefix(start).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(line("appends/s, 256 callers"), ["20,123", "15,000", "25,000", "floor"], "{table}");
        assert_eq!(line("loss with 20 % conflicts"), ["0.0512", "0.2", "0.1", "goal"], "{table}");
        assert_eq!(line("p99 at 5,000/s, ms"), ["21.5", "20", "10", "below", "the", "floor"], "{table}");
        assert_eq!(line("appends_per_s 1"), ["812"], "{table}");
        assert_eq!(
            report.json().unwrap(),
            r#"{"appends_per_s":{"1":812.0,"256":20123.0},"conflict_loss":0.0512,"p99_ms_at_5000":21.5,"seed":7}"#
        );
    }
}
