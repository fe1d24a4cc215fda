//! The versions of recently used scopes, so that a busy scope's expectation is checked without asking the database.

use weft_model::version::Version;

#[expect(clippy::disallowed_types, reason = "looked up for every event, never walked")]
type Versions = std::collections::HashMap<Box<str>, Version>;

/// Scopes per generation. Two generations of short names cost some 30 MiB, and a mesh of 100,000 instances has fewer
/// scopes that change within one turn-over.
const GENERATION_MAX: usize = 100_000;

/// Last known version per scope. True only as of the tail that its owner remembers beside it.
///
/// Bounded by two generations: when the young one is full it becomes the old one, and what the old one held and
/// nobody asked for since is forgotten.
#[derive(Debug, Default)]
pub(super) struct ScopeHeads {
    young: Versions,
    old: Versions,
}

impl ScopeHeads {
    /// The scope's version if it is known; zero means that it has no event.
    pub(super) fn lookup(&mut self, scope: &str) -> Option<Version> {
        if let Some(version) = self.young.get(scope) {
            return Some(*version);
        }
        let (scope, version) = self.old.remove_entry(scope)?;
        self.insert(scope, version);
        Some(version)
    }

    pub(super) fn learn(&mut self, scope: &str, version: Version) {
        match self.young.get_mut(scope) {
            Some(known) => *known = version,
            None => self.insert(scope.into(), version),
        }
    }

    /// Nothing is known any more: the database may have gone on without us.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    fn insert(&mut self, scope: Box<str>, version: Version) {
        if self.young.len() >= GENERATION_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&scope);
        self.young.insert(scope, version);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learned_version_replaces_the_old_one_in_either_generation() {
        let mut heads = ScopeHeads::default();
        heads.learn("kept", Version(1));
        for i in 0..GENERATION_MAX {
            heads.learn(&format!("filler/{i}"), Version(1));
        }
        heads.learn("kept", Version(2));
        assert_eq!(heads.lookup("kept"), Some(Version(2)));
        assert_eq!(heads.lookup("never"), None);
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let mut heads = ScopeHeads::default();
        heads.learn("used", Version(7));
        for i in 0..5 * GENERATION_MAX {
            heads.learn(&format!("filler/{i}"), Version(1));
            if i % 1_000 == 0 {
                assert_eq!(heads.lookup("used"), Some(Version(7)));
            }
        }
        assert!(heads.young.len() + heads.old.len() <= 2 * GENERATION_MAX);
        assert_eq!(heads.lookup("filler/0"), None);
    }
}
