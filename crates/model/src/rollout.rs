//! The `rollout` scope: policies that some sidecars, the canaries, run before everybody does. One rollout at a time in a
//! mesh: what canaries meet with meanwhile is its doing and nobody else's.
//!
//! The policies of a rollout are part of it. The scopes that they are for stay as they are until it is advanced, which changes
//! all of them in one append; if it is aborted, nothing ever happened to them.

mod past;

use crate::command::Command;
use crate::event::event_family;
use crate::id::InstanceId;
use crate::rejection::Rejection;
use crate::scope::{Scope, SecurityScope, TrafficScope};
use crate::security::{SecurityCommand, SecurityPolicy};
use crate::traffic::{TrafficCommand, TrafficPolicy};
use past::{RolloutBegunV1, RolloutBegunV2, RolloutBegunV3};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// A whole, in the unit in which shares and tolerances are given: parts per million.
pub const WHOLE_PPM: u32 = 1_000_000;
/// Most policies of one rollout: a person can still tell which of them was it.
pub const CANDIDATES_MAX: usize = 64;
/// Most canaries: their names fit into one event, and what five hundred sidecars do not meet with, more would hardly.
pub const CANARIES_MAX: usize = 500;
/// How long canaries are watched: several times what they take to say what they meet with, and not so long that nobody remembers why
/// policies cannot be changed.
pub const WATCH_MS: std::ops::RangeInclusive<u32> = 5_000..=86_400_000;
/// Longest reason of an abort, in characters.
pub const REASON_CHARS_MAX: usize = 500;

event_family! {
    /// What can happen in the `rollout` scope.
    RolloutEvent { RolloutBegun = 4 from [RolloutBegunV1, RolloutBegunV2, RolloutBegunV3], RolloutAdvanced = 1, RolloutAborted = 1 }
}

/// The canaries run these policies from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutBegun {
    /// The policies, by scope.
    pub candidates: Vec<Candidate>,
    /// Who runs them.
    pub canaries: BTreeSet<InstanceId>,
    /// For how long they are watched, in milliseconds.
    pub watch_ms: u32,
    /// Which part of their connections may fail or be refused, in parts per million.
    pub tolerance_ppm: u32,
}

/// Everybody runs the policies from now on: the events before this one, in the same append, set them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutAdvanced {
    /// What the canaries met with.
    pub evidence: Evidence,
}

/// The canaries run what everybody runs again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutAborted {
    /// Why.
    pub reason: String,
    /// What the canaries met with.
    pub evidence: Evidence,
}

/// A policy as it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Candidate {
    /// A traffic policy.
    Traffic {
        /// For which connections.
        scope: TrafficScope,
        /// None: the scope has no policy of its own any more.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        policy: Option<TrafficPolicy>,
    },
    /// A security policy.
    Security {
        /// For which services.
        scope: SecurityScope,
        /// None: the scope has no policy of its own any more.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        policy: Option<SecurityPolicy>,
    },
}

impl Candidate {
    /// The scope that it is for.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::Traffic { scope, .. } => Scope::Traffic(scope.clone()),
            Self::Security { scope, .. } => Scope::Security(scope.clone()),
        }
    }

    /// The command that gives it to everybody.
    #[must_use]
    pub fn command(&self) -> Command {
        match self.clone() {
            Self::Traffic { scope, policy } => {
                Command::Traffic(scope, policy.map_or(TrafficCommand::Delete, TrafficCommand::Put))
            }
            Self::Security { scope, policy } => {
                Command::Security(scope, policy.map_or(SecurityCommand::Delete, SecurityCommand::Put))
            }
        }
    }

    /// What a command would give to everybody; none if it is not about a policy.
    #[must_use]
    pub fn of(command: Command) -> Option<Self> {
        match command {
            Command::Traffic(scope, TrafficCommand::Put(policy)) => {
                Some(Self::Traffic { scope, policy: Some(policy) })
            }
            Command::Traffic(scope, TrafficCommand::Delete) => Some(Self::Traffic { scope, policy: None }),
            Command::Security(scope, SecurityCommand::Put(policy)) => {
                Some(Self::Security { scope, policy: Some(policy) })
            }
            Command::Security(scope, SecurityCommand::Delete) => Some(Self::Security { scope, policy: None }),
            Command::Service(..)
            | Command::Membership(..)
            | Command::Health(..)
            | Command::Identity(..)
            | Command::Token(..)
            | Command::Ca(_)
            | Command::Mesh(_)
            | Command::Rollout(_) => None,
        }
    }
}

/// What canaries met with since they run the candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// Connections that lived then, and those that they opened or took since, or tried to.
    pub connections: u64,
    /// Those of them that they refused.
    pub refused: u64,
    /// Those of them that reached nobody.
    pub failed: u64,
}

impl Evidence {
    /// Whether more went wrong than may.
    #[must_use]
    pub fn exceeds(&self, tolerance_ppm: u32) -> bool {
        let wrong = u128::from(self.refused) + u128::from(self.failed);
        let of = wrong.max(self.connections.into());
        wrong * u128::from(WHOLE_PPM) > of * u128::from(tolerance_ppm)
    }
}

impl std::ops::AddAssign for Evidence {
    fn add_assign(&mut self, more: Self) {
        let Self { connections, refused, failed } = more;
        self.connections = self.connections.saturating_add(connections);
        self.refused = self.refused.saturating_add(refused);
        self.failed = self.failed.saturating_add(failed);
    }
}

/// What someone wants of the rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RolloutCommand {
    /// Begin one. Who the canaries are is decided where the whole mesh is seen.
    Begin(Plan),
    /// Give it to everybody.
    Advance(Evidence),
    /// Take it back.
    Abort {
        /// Why.
        reason: String,
        /// What the canaries met with.
        evidence: Evidence,
    },
}

/// A rollout that someone wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The policies, by scope.
    pub candidates: Vec<Candidate>,
    /// Which part of the sidecars that a policy concerns run it first, in parts per million; at least one does.
    pub share_ppm: u32,
    /// For how long they are watched, in milliseconds.
    pub watch_ms: u32,
    /// Which part of their connections may fail or be refused, in parts per million.
    pub tolerance_ppm: u32,
}

/// The rollout of the moment, or how the last one ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// There never was one.
    #[default]
    None,
    /// Canaries run it.
    Running(RolloutBegun),
    /// Everybody was given it.
    Advanced(RolloutAdvanced),
    /// It was taken back.
    Aborted(RolloutAborted),
}

impl RolloutState {
    /// The word for it; empty if there never was one.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::None => "",
            Self::Running(_) => "running",
            Self::Advanced(_) => "advanced",
            Self::Aborted(_) => "aborted",
        }
    }

    /// The one that canaries run.
    #[must_use]
    pub const fn running(&self) -> Option<&RolloutBegun> {
        match self {
            Self::Running(begun) => Some(begun),
            Self::None | Self::Advanced(_) | Self::Aborted(_) => None,
        }
    }
}

/// Checks what can be told of a plan alone.
///
/// # Errors
/// If another rollout is running, or the plan makes no sense.
pub fn check(state: &RolloutState, plan: &Plan) -> Result<(), Rejection> {
    let Plan { candidates, share_ppm, watch_ms, tolerance_ppm } = plan;
    if state.running().is_some() {
        return Err(Rejection::RolloutRunning);
    }
    if !(1..=CANDIDATES_MAX).contains(&candidates.len()) {
        return Err(Rejection::invalid("changes", format!("a rollout has 1 to {CANDIDATES_MAX} policies")));
    }
    let scopes: BTreeSet<Scope> = candidates.iter().map(Candidate::scope).collect();
    if scopes.len() < candidates.len() {
        return Err(Rejection::invalid("changes", "a scope appears twice in one rollout"));
    }
    if !(1..=WHOLE_PPM).contains(share_ppm) {
        return Err(Rejection::invalid("canary.share", "more than 0 % and at most 100 %"));
    }
    if !WATCH_MS.contains(watch_ms) {
        return Err(Rejection::invalid("canary.watch", "from 5 s to 24 h"));
    }
    if *tolerance_ppm > WHOLE_PPM {
        return Err(Rejection::invalid("canary.tolerance", "at most 100 %"));
    }
    Ok(())
}

/// Decides to end the rollout.
///
/// # Errors
/// If none is running.
pub fn end(state: &RolloutState, event: impl Into<RolloutEvent>) -> Result<Vec<RolloutEvent>, Rejection> {
    match state.running() {
        Some(_) => Ok(vec![event.into()]),
        None => Err(Rejection::NoRollout),
    }
}

/// The state after an event.
#[must_use]
pub fn apply(_state: RolloutState, event: &RolloutEvent) -> RolloutState {
    match event {
        RolloutEvent::RolloutBegun(begun) => RolloutState::Running(begun.clone()),
        RolloutEvent::RolloutAdvanced(advanced) => RolloutState::Advanced(advanced.clone()),
        RolloutEvent::RolloutAborted(aborted) => RolloutState::Aborted(aborted.clone()),
    }
}

/// What one canary says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Witnessed {
    /// For how long it has run the candidates; none if it does not, or was not heard of lately.
    pub watched: Option<Duration>,
    /// Why it refused to.
    pub error: Option<String>,
    /// What it met with since; none if it did not say.
    pub evidence: Option<Evidence>,
}

/// What to do about a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Nothing yet.
    Watch,
    /// Everybody gets it.
    Advance(Evidence),
    /// It is taken back.
    Abort {
        /// Why.
        reason: String,
        /// What the canaries met with.
        evidence: Evidence,
    },
}

/// Judges the running rollout, `age` after its begin, by what its canaries say: those that take part, and what is known of `gone`
/// ones. Whatever goes wrong ends it at once; that nothing did is believed when all of them ran it for as long as they are
/// to be watched.
#[must_use]
pub fn judge<'a>(
    begun: &RolloutBegun,
    age: Duration,
    canaries: impl IntoIterator<Item = (&'a InstanceId, &'a Witnessed)>,
    gone: impl IntoIterator<Item = (&'a InstanceId, &'a Witnessed)>,
) -> Judgement {
    let watch = Duration::from_millis(begun.watch_ms.into());
    let (mut evidence, mut wrong, mut late, mut watched) = (Evidence::default(), None, None, None);
    let mut hear = |canary: &InstanceId, witnessed: &Witnessed| {
        let met = witnessed.evidence.unwrap_or_default();
        evidence += met;
        if let Some(error) = &witnessed.error {
            wrong.get_or_insert_with(|| format!("{canary} could not apply it: {error}"));
        } else if met.exceeds(begun.tolerance_ppm) {
            let Evidence { connections, refused, failed } = met;
            wrong.get_or_insert_with(|| {
                format!("of {connections} connections of {canary} {refused} were refused and {failed} failed")
            });
        }
    };
    for (canary, witnessed) in canaries {
        hear(canary, witnessed);
        let runs_it = witnessed.watched.filter(|_| witnessed.evidence.is_some());
        if runs_it.is_none() {
            late.get_or_insert(canary);
        }
        let shortest = watched.unwrap_or(Duration::MAX);
        watched = Some(shortest.min(runs_it.unwrap_or_default()));
    }
    gone.into_iter().for_each(|(canary, witnessed)| hear(canary, witnessed));
    let late = late.filter(|_| age >= watch.saturating_mul(2));
    let silent = late.map(|canary| format!("{canary} does not say that it runs it"));
    let nobody = watched.is_none().then(|| "no canary is left".to_owned());
    match (wrong.or(nobody).or(silent), watched) {
        (Some(reason), _) => {
            Judgement::Abort { reason: reason.chars().take(REASON_CHARS_MAX).collect(), evidence }
        }
        (None, Some(watched)) if watched >= watch => Judgement::Advance(evidence),
        (None, _) => Judgement::Watch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canary(name: &str) -> InstanceId {
        format!("default/db/{name}").parse().unwrap()
    }

    fn plan() -> Plan {
        let scope: TrafficScope = "default/db".parse().unwrap();
        let candidates = vec![Candidate::Traffic { scope, policy: Some(TrafficPolicy::default()) }];
        Plan { candidates, share_ppm: 50_000, watch_ms: 10_000, tolerance_ppm: 10_000 }
    }

    fn begun() -> RolloutBegun {
        let Plan { candidates, watch_ms, tolerance_ppm, .. } = plan();
        let canaries = [canary("db-1"), canary("db-2")].into();
        RolloutBegun { candidates, canaries, watch_ms, tolerance_ppm }
    }

    fn met(connections: u64, refused: u64, failed: u64) -> Witnessed {
        let evidence = Some(Evidence { connections, refused, failed });
        Witnessed { watched: Some(Duration::ZERO), error: None, evidence }
    }

    /// Both ran it from the begin on.
    fn judged(age_s: u64, mut first: Witnessed, mut second: Witnessed) -> Judgement {
        let (a, b, age) = (canary("db-1"), canary("db-2"), Duration::from_secs(age_s));
        for witnessed in [&mut first, &mut second] {
            witnessed.watched = witnessed.watched.map(|_| age);
        }
        judge(&begun(), age, [(&a, &first), (&b, &second)], [])
    }

    fn aborted(judgement: Judgement) -> String {
        match judgement {
            Judgement::Abort { reason, .. } => reason,
            other @ (Judgement::Watch | Judgement::Advance(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_one_runs_at_a_time_and_what_makes_no_sense_does_not_begin() {
        let running = RolloutState::Running(begun());
        assert_eq!(check(&running, &plan()), Err(Rejection::RolloutRunning));
        assert_eq!(check(&RolloutState::None, &plan()), Ok(()));
        let twice = [plan().candidates, plan().candidates].concat();
        for wrong in [
            Plan { candidates: vec![], ..plan() },
            Plan { candidates: twice, ..plan() },
            Plan { share_ppm: 0, ..plan() },
            Plan { share_ppm: WHOLE_PPM + 1, ..plan() },
            Plan { watch_ms: 4_999, ..plan() },
            Plan { tolerance_ppm: WHOLE_PPM + 1, ..plan() },
        ] {
            assert!(
                matches!(check(&RolloutState::None, &wrong), Err(Rejection::Invalid { .. })),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn it_ends_once() {
        let advanced = RolloutAdvanced { evidence: Evidence::default() };
        let events = end(&RolloutState::Running(begun()), advanced.clone()).unwrap();
        let state = events.iter().fold(RolloutState::Running(begun()), apply);
        assert_eq!(state, RolloutState::Advanced(advanced.clone()));
        assert_eq!(end(&state, advanced), Err(Rejection::NoRollout));
    }

    #[test]
    fn it_advances_when_all_were_watched_for_long_enough() {
        assert_eq!(judged(9, met(100, 0, 0), met(100, 0, 0)), Judgement::Watch);
        let all = Evidence { connections: 200, refused: 1, failed: 1 };
        assert_eq!(judged(10, met(100, 1, 0), met(100, 0, 1)), Judgement::Advance(all));
        // Nobody connected, so nothing went wrong.
        assert!(matches!(judged(10, met(0, 0, 0), met(0, 0, 0)), Judgement::Advance(_)));
        // One ran it only lately: it is watched for as long as the others.
        let (a, b, first) = (canary("db-1"), canary("db-2"), met(1, 0, 0));
        let lately = |s| Witnessed { watched: Some(Duration::from_secs(s)), ..met(1, 0, 0) };
        let first = Witnessed { watched: Some(Duration::from_secs(15)), ..first };
        let at = |s| judge(&begun(), Duration::from_secs(20), [(&a, &first), (&b, &lately(s))], []);
        assert_eq!(at(9), Judgement::Watch);
        assert!(matches!(at(10), Judgement::Advance(_)));
    }

    #[test]
    fn whatever_goes_wrong_ends_it_at_once_whoever_meets_with_it() {
        // A busy one does not hide a quiet one.
        let reason = aborted(judged(1, met(100_000, 0, 0), met(100, 2, 1)));
        assert_eq!(reason, "of 100 connections of default/db/db-2 2 were refused and 1 failed");
        let unfit = Witnessed { error: Some("shard trust is missing".into()), ..Witnessed::default() };
        let reason = aborted(judged(1, met(100, 0, 0), unfit));
        assert_eq!(reason, "default/db/db-2 could not apply it: shard trust is missing");
        assert_eq!(aborted(judge(&begun(), Duration::ZERO, [], [])), "no canary is left");
        // What one met with that left meanwhile counts.
        let (here, left) = (canary("db-1"), canary("db-2"));
        let all_well = met(1, 0, 0);
        let reason = aborted(judge(&begun(), Duration::ZERO, [(&here, &all_well)], [(&left, &met(1, 1, 0))]));
        assert!(reason.contains("default/db/db-2"), "{reason}");
    }

    #[test]
    fn what_may_go_wrong_as_a_whole_never_ends_it() {
        // Connections that lived before are cut: more of them than there were since.
        let cut = Evidence { connections: 0, refused: 30, failed: 0 };
        assert!(cut.exceeds(999_999) && !cut.exceeds(WHOLE_PPM));
    }

    #[test]
    fn who_never_says_that_it_runs_it_or_how_holds_it_up_and_then_ends_it() {
        for silent in [Witnessed::default(), Witnessed { evidence: None, ..met(0, 0, 0) }] {
            assert_eq!(judged(19, met(1, 0, 0), silent.clone()), Judgement::Watch);
            let reason = aborted(judged(20, met(1, 0, 0), silent));
            assert_eq!(reason, "default/db/db-2 does not say that it runs it");
        }
    }
}
