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
/// How often it is said though nothing changed: whoever is silent may have broken down.
const SAY_AGAIN_EVERY: Duration = Duration::from_secs(5);
/// Swaps that are remembered: the notice that tells of a rollout comes before its snapshot, or with one of a few after it.
const SWAPS_MAX: usize = 32;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Canary {
    /// What was swapped in lately, with the totals then; oldest first.
    swaps: VecDeque<(ConfigVersion, Evidence)>,
    /// The last rollout that a controller told of.
    watched: Option<Watched>,
    /// Whether it still asks.
    asked: bool,
}

#[derive(Debug)]
struct Watched {
    rollout: Position,
    /// The totals when it took effect; none before.
    from: Option<Evidence>,
    said: Option<(Evidence, Instant)>,
    say_at: Instant,
}

impl Canary {
    /// A controller says which rollout this sidecar is a canary of: 0, none.
    pub(crate) fn told(&mut self, rollout: u64, now: Instant) {
        let rollout = Position(rollout);
        // A controller that is behind may not know of it yet: what was counted stays.
        self.asked = rollout != Position::ZERO;
        if self.asked && self.watched.as_ref().is_none_or(|watched| watched.rollout != rollout) {
            let since = self.swaps.iter().find(|(version, _)| version.position >= rollout);
            let from = since.map(|(_, totals)| *totals);
            self.watched = Some(Watched { rollout, from, said: None, say_at: now });
        }
    }

    /// A snapshot takes effect while so many connections live, which count as met with.
    pub(crate) fn swapped(&mut self, version: ConfigVersion, totals: Evidence, live: u64) {
        let totals = Evidence { connections: totals.connections.saturating_sub(live), ..totals };
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
        self.watched.as_ref().filter(|_| self.asked).map(|watched| watched.say_at)
    }

    /// Looks now. Whether there is something to say.
    pub(crate) fn has_news(&mut self, totals: Evidence, now: Instant) -> bool {
        let Some(watched) = &mut self.watched else { return false };
        watched.say_at = now + SAY_EVERY;
        let Some(met) = watched.met(totals) else { return false };
        watched.said.is_none_or(|(said, at)| said != met || now >= at + SAY_AGAIN_EVERY)
    }

    /// What goes with an acknowledgement.
    pub(crate) fn evidence(&mut self, totals: Evidence, now: Instant) -> Option<v1::Evidence> {
        let watched = self.watched.as_mut().filter(|_| self.asked)?;
        let met = watched.met(totals)?;
        watched.said = Some((met, now));
        let Evidence { connections, refused, failed } = met;
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
    fn what_counts_is_what_lived_at_the_swap_and_came_after() {
        let (mut canary, now) = (Canary::default(), Instant::now());
        canary.swapped(version(3), totals(10, 0), 0);
        canary.told(5, now);
        assert_eq!(canary.say_at(), Some(now));
        assert!(!canary.has_news(totals(11, 0), now), "it does not run it yet");
        assert_eq!(canary.evidence(totals(11, 0), now), None);
        canary.swapped(version(6), totals(12, 1), 4);
        canary.swapped(version(7), totals(14, 1), 4);
        assert!(canary.has_news(totals(15, 2), now));
        let said = canary.evidence(totals(15, 2), now).unwrap();
        assert_eq!((said.rollout, said.connections, said.refused), (5, 7, 1));
        assert_eq!(canary.say_at(), Some(now + SAY_EVERY));
        // The same is said again now and then, and to another controller at once.
        assert!(!canary.has_news(totals(15, 2), now));
        assert!(canary.has_news(totals(15, 2), now + SAY_AGAIN_EVERY));
        canary.greet(now);
        assert!(canary.has_news(totals(15, 2), now));
        // A controller that does not ask is told nothing; another one that does gets all of it.
        canary.told(0, now);
        assert_eq!((canary.say_at(), canary.evidence(totals(16, 3), now)), (None, None));
        canary.told(5, now);
        assert_eq!(
            canary.evidence(totals(16, 3), now).map(|said| (said.connections, said.refused)),
            Some((8, 2))
        );
    }

    #[test]
    fn the_patch_may_come_before_the_word() {
        let (mut canary, now) = (Canary::default(), Instant::now());
        canary.swapped(version(4), totals(1, 0), 0);
        canary.swapped(version(5), totals(2, 0), 0);
        canary.told(5, now);
        let said = canary.evidence(totals(4, 1), now).map(|said| (said.connections, said.refused));
        assert_eq!(said, Some((2, 1)));
    }
}
