//! What this sidecar says of a rollout whose canary it is: what it met with since it runs a version from the rollout on. Pure: it is
//! given the totals and the time.

use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;
use weft_model::rollout::Evidence;
use weft_model::{ConfigVersion, Position};
use weft_proto::v1;

/// How often what changed is said.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// Swaps that are remembered: the notice that tells of a rollout comes before its snapshot, or with one of a few after it.
const SWAPS_MAX: usize = 32;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Canary {
    /// What was swapped in lately, with the totals then; oldest first.
    swaps: VecDeque<(ConfigVersion, Evidence)>,
    watched: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    rollout: Position,
    /// The totals when it took effect; none before.
    from: Option<Evidence>,
    said: Option<Evidence>,
    say_at: Instant,
}

impl Canary {
    /// A controller says which rollout this sidecar is a canary of: 0, none.
    pub(crate) fn told(&mut self, rollout: u64, now: Instant) {
        let rollout = Position(rollout);
        if rollout == Position::ZERO {
            self.watched = None;
        } else if self.watched.as_ref().is_none_or(|watched| watched.rollout != rollout) {
            let since = self.swaps.iter().find(|(version, _)| version.position >= rollout);
            let from = since.map(|(_, totals)| *totals);
            self.watched = Some(Watched { rollout, from, said: None, say_at: now });
        }
    }

    /// A snapshot took effect.
    pub(crate) fn swapped(&mut self, version: ConfigVersion, totals: Evidence) {
        self.swaps.push_back((version, totals));
        if self.swaps.len() > SWAPS_MAX {
            self.swaps.pop_front();
        }
        if let Some(watched) = &mut self.watched
            && watched.from.is_none()
            && version.position >= watched.rollout
        {
            watched.from = Some(totals);
        }
    }

    /// Another controller is told anew.
    pub(crate) fn greet(&mut self, now: Instant) {
        if let Some(watched) = &mut self.watched {
            (watched.said, watched.say_at) = (None, now);
        }
    }

    /// When to look whether there is something to say; none if nobody asks.
    pub(crate) fn say_at(&self) -> Option<Instant> {
        self.watched.as_ref().map(|watched| watched.say_at)
    }

    /// Looks now. Whether there is something to say.
    pub(crate) fn has_news(&mut self, totals: Evidence, now: Instant) -> bool {
        let Some(watched) = &mut self.watched else { return false };
        watched.say_at = now + SAY_EVERY;
        let met = watched.met(totals);
        met.is_some() && met != watched.said
    }

    /// What goes with an acknowledgement.
    pub(crate) fn evidence(&mut self, totals: Evidence) -> Option<v1::Evidence> {
        let watched = self.watched.as_mut()?;
        let Evidence { connections, refused, failed } = watched.met(totals)?;
        watched.said = watched.met(totals);
        Some(v1::Evidence { rollout: watched.rollout.0, connections, refused, failed })
    }
}

impl Watched {
    fn met(&self, totals: Evidence) -> Option<Evidence> {
        let from = self.from?;
        Some(Evidence {
            connections: totals.connections.saturating_sub(from.connections),
            refused: totals.refused.saturating_sub(from.refused),
            failed: totals.failed.saturating_sub(from.failed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Epoch;

    fn version(position: u64) -> ConfigVersion {
        ConfigVersion::new(Epoch(1), Position(position))
    }

    fn totals(connections: u64, refused: u64) -> Evidence {
        Evidence { connections, refused, failed: 0 }
    }

    #[test]
    fn what_counts_is_what_came_after_the_swap() {
        let (mut canary, now) = (Canary::default(), Instant::now());
        canary.swapped(version(3), totals(10, 0));
        canary.told(5, now);
        assert_eq!(canary.say_at(), Some(now));
        assert!(!canary.has_news(totals(11, 0), now), "it does not run it yet");
        assert_eq!(canary.evidence(totals(11, 0)), None);
        canary.swapped(version(6), totals(12, 1));
        canary.swapped(version(7), totals(14, 1));
        assert!(canary.has_news(totals(15, 2), now));
        let said = canary.evidence(totals(15, 2)).unwrap();
        assert_eq!((said.rollout, said.connections, said.refused), (5, 3, 1));
        assert!(!canary.has_news(totals(15, 2), now));
        assert_eq!(canary.say_at(), Some(now + SAY_EVERY));
        canary.greet(now);
        assert!(canary.has_news(totals(15, 2), now), "another controller has not heard it");
        canary.told(0, now);
        assert_eq!((canary.say_at(), canary.evidence(totals(16, 3))), (None, None));
    }

    #[test]
    fn the_patch_may_come_before_the_word() {
        let (mut canary, now) = (Canary::default(), Instant::now());
        canary.swapped(version(4), totals(1, 0));
        canary.swapped(version(5), totals(2, 0));
        canary.told(5, now);
        assert_eq!(canary.evidence(totals(4, 1)).map(|said| (said.connections, said.refused)), Some((2, 1)));
    }
}
