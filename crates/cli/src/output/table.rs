//! Tables without borders, as `kubectl` and `psql -A` readers know them: one line per row, easy to cut and grep.

use crate::output::text::printable;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table as Layout};

/// Rows under headings. A cell that says nothing shows as `-`, so columns can be counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The text, each line ended.
    pub(crate) fn render(&self) -> String {
        render(&self.headings, &self.rows)
    }
}

/// A table whose headings are not known before.
pub(crate) fn render(headings: &[impl AsRef<str>], rows: &[Vec<String>]) -> String {
    let mut layout = Layout::new();
    layout.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    layout.set_header(headings.iter().map(|heading| printable(heading.as_ref())));
    for row in rows {
        layout.add_row(row.iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { printable(cell) }));
    }
    for column in layout.column_iter_mut() {
        column.set_padding((0, 3));
    }
    let lines: Vec<String> = layout.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_nothing_trails() {
        let mut table = Table::new(&["NAME", "PORTS"]);
        table.row(["default/web".into(), "http:8080".into()]);
        table.row(["db".into(), String::new()]);
        assert_eq!(table.render(), "NAME          PORTS\ndefault/web   http:8080\ndb            -\n");
    }

    #[test]
    fn a_cell_stays_one_line() {
        let mut table = Table::new(&["DETAIL"]);
        table.row(["a\nb\u{1b}[31m".into()]);
        assert_eq!(table.render(), "DETAIL\na\\nb\\u{1b}[31m\n");
    }
}
