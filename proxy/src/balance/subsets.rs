//! Which subset of a service a connection goes to, so that in the long run each gets exactly what its weight says. Pure.
//!
//! By turns: a round has as many connections as all weights together (divided by what they have in common), and in it each subset its weight of them, as
//! evenly spread as may be (smooth weighted round robin). So after every whole round the counts are exact, whatever was random in between. By
//! source: a source has a place on a scale on which each subset has a stretch as long as its weight; if a weight grows, sources move only to the
//! subset that got more room, or over the borders behind it.
//!
//! Called by [`crate::routes`], which knows which subsets have anybody.

/// The turns of a round, by subset.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Round(Box<[u8]>);

impl Round {
    /// A round of subsets with these weights. It has no turns if all weights are 0.
    pub(crate) fn of(weights: &[u16]) -> Self {
        let common = weights.iter().copied().fold(0, greatest_common_divisor).max(1);
        let weights: Vec<i64> = weights.iter().map(|weight| i64::from(weight / common)).collect();
        let all: i64 = weights.iter().sum();
        // What each is behind of its part; the one that is most behind is next.
        let mut behind = vec![0; weights.len()];
        let turns = (0..all).filter_map(|_| {
            behind.iter_mut().zip(&weights).for_each(|(behind, weight)| *behind += weight);
            // Of those that are as far behind as each other the first.
            let (next, _) = behind.iter().enumerate().rev().max_by_key(|(_, behind)| **behind)?;
            behind[next] -= all;
            u8::try_from(next).ok()
        });
        Self(turns.collect())
    }

    /// Whose turn it is. None if nobody has one.
    pub(crate) fn at(&self, turn: usize) -> Option<usize> {
        let turn = turn.checked_rem(self.0.len())?;
        Some(self.0[turn].into())
    }
}

/// The subset of a source. None if all weights are 0.
pub(crate) fn of_source(weights: &[u16], source: u64) -> Option<usize> {
    let all: u64 = weights.iter().copied().map(u64::from).sum();
    // The whole width of the hash, not its remainder: a place on the scale stays near where it was when the scale changes.
    let mut at = u64::try_from((u128::from(source) * u128::from(all)) >> 64).unwrap_or(0);
    weights.iter().position(|weight| {
        let weight = u64::from(*weight);
        let here = at < weight;
        at = at.saturating_sub(weight);
        here
    })
}

const fn greatest_common_divisor(mut one: u16, mut other: u16) -> u16 {
    while other != 0 {
        (one, other) = (other, one % other);
    }
    one
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use siphasher::sip::SipHasher13;
    use std::hash::Hasher;

    fn weights() -> impl Strategy<Value = Vec<u16>> {
        prop::collection::vec(prop_oneof![1 => Just(0), 3 => 0..40_u16, 1 => 0..=1_000_u16], 0..=8)
    }

    fn source(number: u64) -> u64 {
        let mut hasher = SipHasher13::new();
        hasher.write_u64(number);
        hasher.finish()
    }

    #[test]
    fn a_canary_gets_its_turn_among_the_others() {
        let round = Round::of(&[95, 5]);
        assert_eq!(round.0.len(), 20, "19 to 1");
        assert_eq!(round.0.iter().filter(|turn| **turn == 1).count(), 1);
        assert_eq!(*Round::of(&[2, 1, 1]).0, [0, 1, 2, 0]);
        assert_eq!(*Round::of(&[0, 7]).0, [1]);
        assert_eq!((Round::of(&[0, 0]).at(3), Round::of(&[]).at(0)), (None, None));
    }

    proptest! {
        /// After every whole round each has exactly its part, and never is one more than two turns away from it.
        #[test]
        fn turns_are_exact(weights in weights(), from in 0..5_000_usize) {
            let round = Round::of(&weights);
            let all: u64 = weights.iter().copied().map(u64::from).sum();
            prop_assert_eq!(round.at(from).is_some(), all > 0);
            let length = round.0.len();
            let mut got = vec![0_u64; weights.len()];
            for turn in 0..length {
                got[round.at(turn + length * from).unwrap()] += 1;
                for (got, weight) in got.iter().zip(&weights) {
                    let due = u64::from(*weight) * (turn as u64 + 1);
                    prop_assert!((got * all).abs_diff(due) <= 2 * all, "{weights:?}: {:?}", round.0);
                }
            }
            for (got, weight) in got.iter().zip(&weights) {
                prop_assert_eq!(got * all, u64::from(*weight) * length as u64);
            }
        }

        #[test]
        fn a_source_has_a_subset_with_a_weight(weights in weights(), source: u64) {
            let found = of_source(&weights, source);
            prop_assert_eq!(found.is_some(), weights.iter().any(|weight| *weight > 0));
            prop_assert!(found.is_none_or(|subset| weights[subset] > 0));
        }
    }

    #[test]
    fn sources_are_spread_by_weight_and_few_move_when_a_weight_grows() {
        let count = |weights: &[u16], subset| {
            (0..10_000).filter(|number| of_source(weights, source(*number)) == Some(subset)).count()
        };
        assert!((450..550).contains(&count(&[95, 5], 1)));
        let moved = (0..10_000).filter(|number| {
            let source = source(*number);
            of_source(&[95, 5], source) != of_source(&[90, 10], source)
        });
        assert!((430..570).contains(&moved.count()));
    }
}
