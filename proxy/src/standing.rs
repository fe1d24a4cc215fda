//! What becomes of a live connection that policies permitted and do not permit any more: it is cut, has a grace, or is kept, as
//! `on_change` says. Pure: what the policies say and the time are arguments.
//!
//! A grace begins with the first snapshot that gives one, and ends with the first that permits the connection again or keeps it. One that
//! follows another with another length counts from the same beginning: changing the length again and again makes no connection live
//! for ever.
//!
//! What policies say is not all there is. A port or a service that is gone ends connections whatever `on_change` says; that is asked before. And what is
//! about an identity always cuts: a deny rule that names the source is a cut already where policies are evaluated
//! ([`weft_routing::verdict::authorize_live`]). Should identities be revoked or roots be withdrawn one day, that has to be asked before
//! as well, and never here. Called by [`crate::shared`] for each live inbound connection on each snapshot.

use std::time::Duration;
use tokio::time::Instant;
use weft_model::security::OnChange;

/// How a live connection stands with the policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Standing {
    /// They permit it.
    #[default]
    Permitted,
    /// They do not, and it is cut at `until`.
    Grace { since: Instant, until: Instant },
    /// They do not, and it goes on until it ends.
    Kept,
}

impl Standing {
    /// How it stands after a snapshot whose policies say this, none if they permit it. None if it is to be cut.
    pub(crate) fn after(self, said: Option<OnChange>, now: Instant) -> Option<Self> {
        match said {
            None => Some(Self::Permitted),
            Some(OnChange::Cut) => None,
            Some(OnChange::Keep) => Some(Self::Kept),
            Some(OnChange::Grace(ms)) => {
                let since = match self {
                    Self::Grace { since, .. } => since,
                    Self::Permitted | Self::Kept => now,
                };
                let until = since + Duration::from_millis(ms.into());
                (now < until).then_some(Self::Grace { since, until })
            }
        }
    }

    /// When it is cut if nothing changes.
    pub(crate) const fn ends(self) -> Option<Instant> {
        match self {
            Self::Grace { until, .. } => Some(until),
            Self::Permitted | Self::Kept => None,
        }
    }

    /// The word for what spares it; none if nothing has to.
    pub(crate) const fn spared_by(self) -> Option<&'static str> {
        match self {
            Self::Permitted => None,
            Self::Grace { .. } => Some(OnChange::Grace(0).as_str()),
            Self::Kept => Some(OnChange::Keep.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said() -> impl Strategy<Value = Option<OnChange>> {
        prop_oneof![
            3 => Just(None),
            1 => Just(Some(OnChange::Cut)),
            2 => Just(Some(OnChange::Keep)),
            4 => (1..40_u32).prop_map(|ms| Some(OnChange::Grace(ms))),
        ]
    }

    /// When a connection is cut, in milliseconds: looked at in each of them. What is due at a moment comes before a snapshot of the same.
    fn model(history: &[(u64, Option<OnChange>)], last: u64) -> Option<u64> {
        let (mut heard, mut since) = (None, None);
        for now in 0..=last {
            let due = |heard, since: Option<u64>| match (heard, since) {
                (Some(OnChange::Grace(ms)), Some(since)) => now >= since + u64::from(ms),
                _ => heard == Some(OnChange::Cut),
            };
            if due(heard, since) {
                return Some(now);
            }
            for (_, said) in history.iter().filter(|(at, _)| *at == now) {
                let grace = matches!(said, Some(OnChange::Grace(_)));
                (heard, since) = (*said, grace.then(|| since.unwrap_or(now)));
                if due(heard, since) {
                    return Some(now);
                }
            }
        }
        None
    }

    proptest! {
        /// Whatever snapshots say and when, a connection ends at the very moment at which the naive model says so, or not at all.
        #[test]
        fn it_ends_when_it_is_said_to(gaps in prop::collection::vec((0..15_u64, said()), 1..20)) {
            let mut at = 0;
            let history: Vec<_> = gaps.into_iter().map(|(gap, said)| { at += gap; (at, said) }).collect();
            let last = at + 50;
            let begin = Instant::now();
            let moment = |ms| begin + Duration::from_millis(ms);
            let mut standing = Standing::default();
            let mut cut = None;
            for (now, said) in &history {
                if let Some(ends) = standing.ends().filter(|ends| *ends <= moment(*now)) {
                    cut = Some(ends);
                    break;
                }
                match standing.after(*said, moment(*now)) {
                    Some(next) => standing = next,
                    None => { cut = Some(moment(*now)); break }
                }
            }
            let cut = cut.or(standing.ends());
            prop_assert_eq!(cut, model(&history, last).map(moment));
        }
    }

    #[test]
    fn what_spares_a_connection_is_told() {
        let now = Instant::now();
        let grace = Standing::default().after(Some(OnChange::Grace(5)), now).unwrap();
        assert_eq!((grace.spared_by(), grace.ends()), (Some("grace"), Some(now + Duration::from_millis(5))));
        let kept = grace.after(Some(OnChange::Keep), now).unwrap();
        assert_eq!((kept.spared_by(), kept.ends()), (Some("keep"), None));
        let again = kept.after(None, now).unwrap();
        assert_eq!((again.spared_by(), again), (None, Standing::Permitted));
        assert_eq!(again.after(Some(OnChange::Cut), now), None);
    }
}
