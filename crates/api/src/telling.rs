//! What a subscriber is told, and when. Pure: it looks at what is published, and is given the time.
//!
//! There is no queue: whatever was published since the last look is one notice. A notice is due when the caller's own
//! snapshot changed, else as a heartbeat. It brings what changed since the caller was last told, if that is little; a caller that
//! does not have that snapshot after all finds that it does not fit, and pulls.
//!
//! Two drive it: the [`discovery`](crate::discovery) service, and the simulation of the control plane, whose network loses
//! notices, doubles them, and brings them in another order.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use weft_eventlog::Point;
use weft_model::{ConfigVersion, InstanceId, Position};
use weft_projector::{Patch, Published, WantedSnapshot};
use weft_proto::v1 as pb;
use weft_routing::Hash;

use crate::convert::config_version;
use crate::pull::{self, header, short_header};

/// When the next notice comes at the latest. Two missed ones tell a sidecar within ten seconds that it is on its own.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long a witness of what was told may be late in a small fleet: as long as a sidecar may take to write it down. A notice of a change
/// goes without, since it would be twice as long. In a large fleet they come over so many times what its acknowledgements take: the
/// next change is not to find the controller busy with what somebody else has shown already.
const WITNESS_WITHIN: Duration = Duration::from_secs(1);
const WITNESS_SPREAD: u32 = 4;

/// See the module's documentation.
#[derive(Debug)]
pub struct Telling {
    instance: InstanceId,
    /// What the caller was last told to run; at first, what it says it runs.
    told: Option<(ConfigVersion, Hash)>,
    next_heartbeat: Instant,
    /// Where in the fleet's order this one's turn is, from 0 to 1.
    place: f64,
}

/// What is to be said.
#[derive(Debug)]
pub struct News {
    head: ConfigVersion,
    wanted: Option<(ConfigVersion, Hash)>,
    /// The rollout that the caller is a canary of.
    rollout: Option<Position>,
    patch: Option<Arc<Patch>>,
    /// What a witness is to come along of; none with a notice of a change.
    pub witness: Option<Point>,
}

impl Telling {
    /// To a caller that says it runs `have`. Its first notice is due at once.
    #[must_use]
    pub fn new(instance: InstanceId, have: Option<(ConfigVersion, Hash)>, now: Instant) -> Self {
        // Any number that differs from caller to caller will do.
        let place = f64::from(Hash::of(instance.to_string().as_bytes()).prefix()) / f64::from(u32::MAX);
        Self { instance, told: have, next_heartbeat: now, place }
    }

    /// Who is told.
    #[must_use]
    pub const fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// This one's share of a time over which a fleet is to be spread: the same each time, and another one for most others.
    #[must_use]
    pub fn turn(&self, spread: Duration) -> Duration {
        spread.mul_f64(self.place)
    }

    /// When there is something to say at the latest.
    #[must_use]
    pub const fn next_heartbeat(&self) -> Instant {
        self.next_heartbeat
    }

    /// What is to be said now; none if there is nothing. Counts as said. `ack_spread` is what the fleet's acknowledgements are spread over.
    pub fn next(&mut self, published: &Published, now: Instant, ack_spread: Duration) -> Option<News> {
        let wanted = published.wanted(&self.instance);
        let news = wanted.as_ref().map(WantedSnapshot::named);
        let (heartbeat, change) = (now >= self.next_heartbeat, self.told != news);
        if !heartbeat && !change {
            return None;
        }
        let base = self.told.filter(|_| change).map(|(_, hash)| hash);
        let rollout = wanted.as_ref().and_then(|wanted| wanted.class.rollout);
        let patch = wanted.zip(base).and_then(|(wanted, base)| published.patch(wanted.class, base));
        self.told = news;
        self.next_heartbeat = if heartbeat {
            now + HEARTBEAT
        } else {
            let within = WITNESS_WITHIN + self.turn(ack_spread.saturating_mul(WITNESS_SPREAD));
            self.next_heartbeat.min(now + within)
        };
        let witness = published.point().filter(|_| heartbeat);
        Some(News { head: published.version(), wanted: news, rollout, patch, witness })
    }
}

impl News {
    /// In the words of the wire, with a signed witness if there is one. The caller is to spread its acknowledgement over
    /// `ack_spread`.
    #[must_use]
    pub fn notice(&self, witness: Bytes, ack_spread: Duration) -> pb::Notice {
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        pb::Notice {
            wanted: self.wanted.map(|(version, hash)| match self.patch {
                Some(_) => short_header(version, hash),
                None => header(version, hash),
            }),
            head: Some(config_version(self.head)),
            heartbeat_ms: millis(HEARTBEAT),
            witness,
            patch: self
                .patch
                .as_deref()
                .zip(self.wanted)
                .map(|(patch, (wanted, _))| pull::patch(patch, wanted)),
            // Canaries are few, and watched from their acknowledgement on.
            ack_spread_ms: if self.rollout.is_some() { 0 } else { millis(ack_spread) },
            rollout: self.rollout.unwrap_or_default().0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_projector::Leadership;
    use weft_projector::View;
    use weft_routing::fixture;

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    #[test]
    fn the_first_notice_comes_at_once_then_changes_then_heartbeats() {
        let facts = fixture::facts(&fixture::events(&web()));
        let (view, mut leadership) = (View::new(), Leadership::default());
        let mut publish = |facts: &[weft_model::Fact]| {
            let delta = view.fold(facts, None).unwrap();
            let version = delta.version;
            leadership.folded(delta);
            leadership.publish(&view, version);
        };
        let began = Instant::now();
        let mut telling = Telling::new(web(), None, began);
        let mut next = |after: Duration| {
            view.published(|published| telling.next(published, began + after, Duration::ZERO))
        };
        publish(&facts[..2]);
        let first = next(Duration::ZERO).unwrap().notice(Bytes::new(), Duration::ZERO);
        assert_eq!((first.wanted, first.head.unwrap().position), (None, 2));
        assert!(next(Duration::ZERO).is_none());
        publish(&facts[2..]);
        let change = next(Duration::from_secs(1)).unwrap();
        assert!(change.witness.is_none() && change.patch.is_none());
        assert_eq!(change.wanted.unwrap().0.position.0, 3);
        // The witness of a change comes with a heartbeat of its own, soon; then they come as always.
        assert!(next(Duration::from_millis(1_999)).is_none());
        assert_eq!(next(Duration::from_secs(2)).unwrap().wanted, change.wanted);
        assert!(next(Duration::from_millis(6_999)).is_none());
        assert!(next(Duration::from_secs(7)).is_some());
    }
    #[test]
    fn in_a_large_fleet_witnesses_of_a_change_come_one_after_the_other() {
        let spread = Duration::from_secs(1);
        let began = Instant::now();
        let mut due: Vec<_> = (0..100)
            .map(|number| {
                let instance = format!("default/web/web-{number}").parse().unwrap();
                let mut telling =
                    Telling::new(instance, Some((ConfigVersion::default(), Hash::of(b"x"))), began);
                // A heartbeat, and a change behind it: nobody of whom nothing is published is wanted to run anything.
                telling.next_heartbeat = began + HEARTBEAT;
                View::new().published(|published| telling.next(published, began, spread)).unwrap();
                telling.next_heartbeat() - began
            })
            .collect();
        due.sort_unstable();
        assert!(due[0] >= WITNESS_WITHIN && due[99] <= HEARTBEAT);
        // A tenth of the time never has more than a fourth of them.
        let tenth = spread * WITNESS_SPREAD / 10;
        assert!(due.windows(26).all(|some| some[25] - some[0] > tenth), "{due:?}");
    }
}
