//! The last versions that were published, and for which classes: from it follows how a change reached its sidecars.
//! Whoever follows it looks often enough, or misses the oldest.

use std::collections::{BTreeMap, VecDeque};
use tokio::time::Instant;
use weft_model::ConfigVersion;
use weft_routing::ClassId;

/// Announcements that are kept for whoever follows them. They are taken at every acknowledgement, and several times a second.
const ANNOUNCED_MAX: usize = 1_024;
/// Classes in all of these together: what a mesh of ten thousand classes changes in six changes for all.
const CLASSES_MAX: usize = 1 << 16;

/// A version that something changed for sidecars with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// What sidecars of these classes are to run from then on.
    pub version: ConfigVersion,
    /// The classes.
    pub classes: Vec<ClassId>,
    /// How many sidecars are in them, in the whole mesh.
    pub sidecars: usize,
    /// When this controller had folded it.
    pub folded_at: Instant,
    /// When this controller told its sidecars.
    pub published_at: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Announcements {
    newest: VecDeque<Announced>,
    /// How many there ever were.
    count: u64,
    classes: usize,
}

impl Announcements {
    /// Takes in what one publication brought: version, class and its members.
    pub(super) fn push(
        &mut self,
        news: Vec<(ConfigVersion, ClassId, usize)>,
        folded_at: Instant,
        published_at: Instant,
    ) {
        let mut by_version = BTreeMap::<ConfigVersion, Announced>::new();
        self.classes += news.len();
        for (version, class, sidecars) in news {
            let announced = by_version.entry(version).or_insert_with(|| Announced {
                version,
                classes: Vec::new(),
                sidecars: 0,
                folded_at,
                published_at,
            });
            announced.classes.push(class);
            announced.sidecars += sidecars;
        }
        self.count += by_version.len() as u64;
        self.newest.extend(by_version.into_values());
        while self.newest.len() > ANNOUNCED_MAX || self.classes > CLASSES_MAX {
            let Some(oldest) = self.newest.pop_front() else { break };
            self.classes -= oldest.classes.len();
        }
    }

    pub(super) fn after(&self, seen: u64) -> (u64, Vec<Announced>) {
        let fresh = usize::try_from(self.count.saturating_sub(seen)).unwrap_or(usize::MAX);
        let skip = self.newest.len().saturating_sub(fresh);
        (self.count, self.newest.iter().skip(skip).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::membership::Upstreams;
    use weft_model::{Epoch, Position};
    use weft_routing::InterestClass;

    fn push(announcements: &mut Announcements, position: u64, classes: usize) {
        let version = ConfigVersion::new(Epoch(1), Position(position));
        let class = InterestClass {
            service: "default/api".parse().unwrap(),
            upstreams: Upstreams::All,
            canary: false,
        };
        let news = (0..classes).map(|_| (version, class.id(), 3)).collect();
        announcements.push(news, Instant::now(), Instant::now());
    }

    fn positions(announced: &[Announced]) -> Vec<u64> {
        announced.iter().map(|announced| announced.version.position.0).collect()
    }

    #[test]
    fn whoever_follows_gets_each_once() {
        let mut announcements = Announcements::default();
        push(&mut announcements, 7, 2);
        let (seen, fresh) = announcements.after(0);
        assert_eq!((positions(&fresh), fresh[0].sidecars, fresh[0].classes.len()), (vec![7], 6, 2));
        push(&mut announcements, 8, 1);
        push(&mut announcements, 9, 1);
        let (seen, fresh) = announcements.after(seen);
        assert_eq!(positions(&fresh), [8, 9]);
        assert_eq!(announcements.after(seen), (3, vec![]));
    }

    #[test]
    fn they_are_bounded_in_number_and_in_classes() {
        let mut announcements = Announcements::default();
        (1..=5_000).for_each(|position| push(&mut announcements, position, 1));
        assert_eq!(announcements.after(0).1.len(), ANNOUNCED_MAX);
        push(&mut announcements, 5_001, CLASSES_MAX - 1);
        assert_eq!(positions(&announcements.after(0).1), [5_000, 5_001]);
    }
}
