//! The settings of health damping: how much a change of health costs an endpoint, how fast that is forgotten, and from when
//! on the endpoint is held down. What the settings do is in `weft-routing`'s `damping`.
//!
//! The defaults are chosen so that what a deploy does can never reach them: four downs in a burst hold an endpoint down,
//! for a good minute; one that goes down three times a minute is never held; a new instance starts at nothing. RFC 7196 tells
//! what became of defaults that punished normal convergence: they were switched off.

use crate::rejection::Rejection;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Points for each time that an endpoint goes from healthy to unhealthy.
pub const POINTS_PER_DOWN: u32 = 1_000;
/// Points for each change of what is registered of an endpoint (its place, its metadata, such as a zone or weight).
pub const POINTS_PER_CHANGE: u32 = 250;

/// Shorter, and the points of two probes in a row would not add up; longer, and yesterday's deploy counts today.
const HALF_LIFE_MS: RangeInclusive<u32> = 1_000..=3_600_000;
/// Highest threshold: more than a thousand downs is the same as never.
pub const POINTS_MAX: u32 = 1_000_000;
const POINTS: RangeInclusive<u32> = 1..=POINTS_MAX;
/// How many half-lives an endpoint may at most be held after it calmed down: keeps points within 36 bits.
const HALF_LIVES_MAX: u64 = 16;

/// How flapping endpoints are damped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DampingSettings {
    /// Whether they are at all.
    pub enabled: bool,
    /// After how long half of an endpoint's points are forgotten, in milliseconds.
    pub half_life_ms: u32,
    /// An endpoint that goes down with more points than this is held down.
    pub suppress: u32,
    /// With fewer than this it may be let go.
    pub reuse: u32,
    /// How long an endpoint may be held after it calmed down, in milliseconds; bounds its points.
    pub hold_max_ms: u32,
}

impl Default for DampingSettings {
    fn default() -> Self {
        Self { enabled: true, half_life_ms: 30_000, suppress: 3_000, reuse: 750, hold_max_ms: 150_000 }
    }
}

/// Checks settings.
///
/// # Errors
/// If a value is out of its range, or they contradict each other.
pub fn check(settings: &DampingSettings) -> Result<(), Rejection> {
    let DampingSettings { enabled: _, half_life_ms, suppress, reuse, hold_max_ms } = *settings;
    if !HALF_LIFE_MS.contains(&half_life_ms) {
        return Err(Rejection::invalid("damping.half_life", "from 1 s to 1 h"));
    }
    if !POINTS.contains(&suppress) {
        return Err(Rejection::invalid("damping.suppress", "from 1 to 1000000 points"));
    }
    if !POINTS.contains(&reuse) || reuse >= suppress {
        return Err(Rejection::invalid("damping.reuse", "at least 1, and below suppress"));
    }
    if u64::from(hold_max_ms) > u64::from(half_life_ms) * HALF_LIVES_MAX {
        let rule = format!("at most {HALF_LIVES_MAX} half-lives");
        return Err(Rejection::invalid("damping.hold_max", rule));
    }
    // Points are kept up to reuse * 2^(hold_max / half_life); below suppress nothing would ever be held.
    let halvings = u64::from(hold_max_ms) / u64::from(half_life_ms);
    if u64::from(reuse) << halvings <= u64::from(suppress) {
        let rule = "too short: points would end below suppress, and nothing would be held; \
                    reuse doubled once per half-life must exceed suppress";
        return Err(Rejection::invalid("damping.hold_max", rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_right() {
        assert_eq!(check(&DampingSettings::default()), Ok(()));
    }

    #[test]
    fn settings_that_cannot_work_are_refused_by_name() {
        let base = DampingSettings::default();
        for (settings, field) in [
            (DampingSettings { half_life_ms: 10, ..base }, "half_life"),
            (DampingSettings { half_life_ms: 3_600_001, ..base }, "half_life"),
            (DampingSettings { suppress: 0, ..base }, "suppress"),
            (DampingSettings { reuse: 3_000, ..base }, "reuse"),
            (DampingSettings { reuse: 0, ..base }, "reuse"),
            (DampingSettings { hold_max_ms: 481_000, ..base }, "hold_max"),
            (DampingSettings { hold_max_ms: 60_000, ..base }, "hold_max"),
        ] {
            let error = check(&settings).unwrap_err();
            assert!(error.to_string().starts_with(&format!("damping.{field}:")), "{error}");
        }
    }
}
