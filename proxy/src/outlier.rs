//! When an endpoint that fails is passed over, and when it is taken again. Pure: outcomes of attempts and the time go in,
//! what changed comes out, with everything that it rests on.
//!
//! ```text
//!                `failures` failures, or resets, in a row
//!                     and the service's share allows it
//!        ┌────────┐ ─────────────────────────────────▶ ┌─────────┐
//!        │ closed │                                    │ ejected │ passed over while there are others
//!        └────────┘ ◀───────────────────────────────── └─────────┘
//!             ▲       an attempt as a last resort opens    │   ▲
//!             │                                            │   │ it fails: for twice as long
//!             │                              its time is up│   │
//!             │           the trial opens                  ▼   │
//!             └──────────────────────────────────── ┌───────────┐
//!                                                   │ returning │ one connection at a time tries it
//!                                                   └───────────┘
//! ```
//!
//! * *Failures* are connects that are refused, time out, or fail in TLS; one that opens ends their row. *Resets* are
//!   connections that opened and were reset by the server before its first byte; one that ends in another way ends their row. The
//!   two are counted apart: an endpoint that accepts and then resets opens every time.
//! * The first ejection takes `ejection_base`, each further one twice as long as the one before, `ejection_max` at most.
//!   Who has been closed for `ejection_max` is as good as new: the next ejection takes `ejection_base` again.
//! * Of the endpoints of a service that take connections at most `ejected_percent_max` are ejected or returning, but one
//!   may always be. One that may not be ejected is *kept*: the next failure asks again.
//! * At the very moment when its time is up an ejected endpoint is returning. There is no timer.
//! * An outcome speaks of the state in which its attempt began, and is not heard in a later one: the last attempts before an
//!   ejection that fail afterwards do not make it longer, and what fails of them after the return is no failure of the trial.
//! * One that the mesh sees become healthy, and that was not, is returning at once: somebody nearer has seen it work.
//! * One that was ejected for resets comes back with one left: the next reset ejects it again.
//!
//! [`crate::routes`] keeps one machine for each endpoint that ever failed, and reads what it needs for a choice without asking it.
//! `docs/traffic.md` says the same to operators.

use weft_model::CloseReason;
use weft_model::traffic::OutlierPolicy;

/// What an endpoint did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    ConnectRefused,
    ConnectTimeout,
    TlsFailed,
    /// It opened the connection, and broke it off before the first byte.
    Reset,
}

impl Cause {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 4] =
        [Self::ConnectRefused, Self::ConnectTimeout, Self::TlsFailed, Self::Reset];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::TlsFailed => "tls_failed",
            Self::Reset => "reset_before_first_byte",
        }
    }

    /// What a failed attempt says of the endpoint; none if it says nothing: a policy refused, or this side could not.
    pub(crate) const fn of(reason: CloseReason) -> Option<Self> {
        match reason {
            CloseReason::ConnectTimeout => Some(Self::ConnectTimeout),
            CloseReason::TlsFailed | CloseReason::IdentityRevoked => Some(Self::TlsFailed),
            // Whatever the sidecar there cannot do, a connection to it is refused.
            CloseReason::ConnectRefused
            | CloseReason::EndpointRemoved
            | CloseReason::DrainDeadline
            | CloseReason::ProxyShutdown
            | CloseReason::NoSnapshot => Some(Self::ConnectRefused),
            CloseReason::ClientFin
            | CloseReason::ServerFin
            | CloseReason::ClientReset
            | CloseReason::ServerReset
            | CloseReason::IdleTimeout
            | CloseReason::MaxAge
            | CloseReason::PolicyDenied
            | CloseReason::PolicyChanged
            | CloseReason::CertExpired
            | CloseReason::NoHealthyEndpoint
            | CloseReason::CircuitOpen
            | CloseReason::Overload
            | CloseReason::Internal => None,
        }
    }
}

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Closed,
    Ejected,
    Returning,
}

impl State {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Ejected => "ejected",
            Self::Returning => "returning",
        }
    }
}

/// How many endpoints a service has that take connections, and how many of them are ejected or returning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) ejected: usize,
    pub(crate) endpoints: usize,
}

impl Share {
    /// Whether one more may be ejected.
    const fn allows_one_more(self, policy: &OutlierPolicy) -> bool {
        let most = self.endpoints * policy.ejected_percent_max as usize / 100;
        self.ejected < if most == 0 { 1 } else { most }
    }
}

/// What an outcome led to, and what that rests on. Times are in milliseconds, as they were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Closed or returning to ejected.
    Ejected {
        from: State,
        cause: Cause,
        /// Failures or resets in a row, with this one.
        in_a_row: u32,
        /// Ejections in a row, with this one.
        ejections: u32,
        length_ms: u64,
        until: u64,
        /// Before this one; none if it was one of them.
        share: Option<Share>,
    },
    /// It would have been ejected, but too many are.
    Kept { cause: Cause, in_a_row: u32, share: Share },
    /// Ejected or returning to closed.
    Returned { from: State, ejections: u32 },
}

/// What is known of an endpoint that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    failures: u32,
    resets: u32,
    /// Ejections in a row.
    ejections: u32,
    ejection: Option<Ejection>,
    /// Since when it is closed; 0 for ever.
    closed_at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ejection {
    since: u64,
    until: u64,
    cause: Cause,
    /// How many failures in a row are too many, as it was then.
    failures: u32,
}

impl Machine {
    pub(crate) fn state(&self, now: u64) -> State {
        match &self.ejection {
            None => State::Closed,
            Some(ejection) if now < ejection.until => State::Ejected,
            Some(_) => State::Returning,
        }
    }

    /// When the ejection is over; none if it is closed.
    pub(crate) fn until(&self) -> Option<u64> {
        self.ejection.map(|ejection| ejection.until)
    }

    /// Failures or resets in a row, whichever are more.
    pub(crate) fn in_a_row(&self) -> u32 {
        self.failures.max(self.resets)
    }

    pub(crate) const fn ejections(&self) -> u32 {
        self.ejections
    }

    /// Whether a success changes anything.
    pub(crate) const fn hears_successes(&self) -> bool {
        self.ejection.is_some() || self.failures != 0 || self.resets != 0
    }

    /// Whether it is as one that never failed.
    pub(crate) fn is_blank(&self, policy: &OutlierPolicy, now: u64) -> bool {
        let forgiven = self.ejections == 0 || self.is_forgiven(policy, now);
        self.ejection.is_none() && self.failures == 0 && self.resets == 0 && forgiven
    }

    /// An attempt that began at `begun` failed. `share` is asked if it matters.
    pub(crate) fn failed(
        &mut self,
        cause: Cause,
        begun: u64,
        now: u64,
        policy: &OutlierPolicy,
        share: impl FnOnce() -> Share,
    ) -> Option<Step> {
        match self.state(now) {
            State::Ejected => None,
            State::Returning => {
                // A connection that was opened before says nothing about the trial.
                let heard = self.ejection.is_some_and(|ejection| begun >= ejection.until);
                heard.then(|| self.eject(State::Returning, cause, 1, now, policy, None))
            }
            State::Closed if begun < self.closed_at => None,
            State::Closed => {
                let row = if cause == Cause::Reset { &mut self.resets } else { &mut self.failures };
                *row = row.saturating_add(1);
                let in_a_row = *row;
                if in_a_row < u32::from(policy.failures) {
                    return None;
                }
                let share = share();
                if !share.allows_one_more(policy) {
                    return Some(Step::Kept { cause, in_a_row, share });
                }
                if self.is_forgiven(policy, now) {
                    self.ejections = 0;
                }
                Some(self.eject(State::Closed, cause, in_a_row, now, policy, Some(share)))
            }
        }
    }

    /// An attempt that began at `begun` opened a connection.
    pub(crate) fn opened(&mut self, begun: u64, now: u64) -> Option<Step> {
        let Some(ejection) = self.ejection else {
            self.failures = 0;
            return None;
        };
        let from = self.state(now);
        let entered = if from == State::Ejected { ejection.since } else { ejection.until };
        if begun < entered {
            return None;
        }
        self.failures = 0;
        self.resets = if ejection.cause == Cause::Reset { ejection.failures.saturating_sub(1) } else { 0 };
        self.ejection = None;
        self.closed_at = now;
        Some(Step::Returned { from, ejections: self.ejections })
    }

    /// A connection that began at `begun` had a first byte, or ended without being reset by the server.
    pub(crate) const fn answered(&mut self, begun: u64) {
        if self.ejection.is_none() && begun >= self.closed_at {
            self.resets = 0;
        }
    }

    /// The mesh sees it healthy, and did not before.
    pub(crate) fn became_eligible(&mut self, now: u64) {
        if let Some(ejection) = &mut self.ejection {
            ejection.until = ejection.until.min(now);
        }
    }

    fn is_forgiven(&self, policy: &OutlierPolicy, now: u64) -> bool {
        now.saturating_sub(self.closed_at) >= u64::from(policy.ejection_max_ms)
    }

    fn eject(
        &mut self,
        from: State,
        cause: Cause,
        in_a_row: u32,
        now: u64,
        policy: &OutlierPolicy,
        share: Option<Share>,
    ) -> Step {
        let doubled = u64::from(policy.ejection_base_ms).saturating_mul(1 << self.ejections.min(32));
        let length_ms = doubled.min(u64::from(policy.ejection_max_ms));
        self.ejections = self.ejections.saturating_add(1);
        let until = now + length_ms;
        self.ejection = Some(Ejection { since: now, until, cause, failures: u32::from(policy.failures) });
        (self.failures, self.resets) = (0, 0);
        Step::Ejected { from, cause, in_a_row, ejections: self.ejections, length_ms, until, share }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use weft_model::traffic::TrafficPolicy;

    const POLICY: OutlierPolicy = OutlierPolicy {
        enabled: true,
        failures: 3,
        ejection_base_ms: 10_000,
        ejection_max_ms: 60_000,
        ejected_percent_max: 50,
    };
    const FREE: Share = Share { ejected: 0, endpoints: 4 };

    fn fail(machine: &mut Machine, cause: Cause, now: u64) -> Option<Step> {
        machine.failed(cause, now, now, &POLICY, || FREE)
    }

    /// Ejects a closed one, by as many failures as it takes.
    fn eject(machine: &mut Machine, cause: Cause, now: u64) -> (u64, u32) {
        for _ in 0..POLICY.failures {
            if let Some(Step::Ejected { until, ejections, .. }) = fail(machine, cause, now) {
                return (until, ejections);
            }
        }
        panic!("not ejected: {machine:?}");
    }

    #[test]
    fn the_third_failure_in_a_row_ejects_for_exactly_the_base_time() {
        for cause in Cause::ALL {
            let mut machine = Machine::default();
            assert_eq!(fail(&mut machine, cause, 5), None);
            assert_eq!(fail(&mut machine, cause, 6), None);
            assert_eq!(machine.state(6), State::Closed);
            let step = Step::Ejected {
                from: State::Closed,
                cause,
                in_a_row: 3,
                ejections: 1,
                length_ms: 10_000,
                until: 10_007,
                share: Some(FREE),
            };
            assert_eq!(fail(&mut machine, cause, 7), Some(step));
            assert_eq!(machine.state(7), State::Ejected);
            assert_eq!(machine.state(10_006), State::Ejected);
            assert_eq!(machine.state(10_007), State::Returning);
        }
    }

    #[test]
    fn what_opens_ends_a_row_of_failures_and_what_answers_one_of_resets() {
        let mut machine = Machine::default();
        for now in 1..100 {
            let cause = Cause::ALL[usize::try_from(now).unwrap() % 3];
            assert_eq!(fail(&mut machine, cause, now), None);
            assert_eq!(fail(&mut machine, cause, now), None);
            assert_eq!(machine.opened(now, now), None);
        }
        for now in 100..200 {
            assert_eq!(fail(&mut machine, Cause::Reset, now), None);
            assert_eq!(machine.opened(now, now), None, "opening is not answering");
            assert_eq!(fail(&mut machine, Cause::Reset, now), None);
            machine.answered(now);
        }
        for _ in 0..2 {
            assert_eq!(fail(&mut machine, Cause::Reset, 200), None);
            assert_eq!(machine.opened(200, 200), None);
        }
        assert!(matches!(fail(&mut machine, Cause::Reset, 200), Some(Step::Ejected { .. })));
    }

    #[test]
    fn each_failed_trial_doubles_the_time_up_to_the_most() {
        let mut machine = Machine::default();
        let mut now = eject(&mut machine, Cause::ConnectTimeout, 1).0;
        for (length, ejections) in [(20_000, 2), (40_000, 3), (60_000, 4), (60_000, 5)] {
            assert_eq!(machine.state(now), State::Returning);
            let step = Step::Ejected {
                from: State::Returning,
                cause: Cause::ConnectRefused,
                in_a_row: 1,
                ejections,
                length_ms: length,
                until: now + length,
                share: None,
            };
            assert_eq!(fail(&mut machine, Cause::ConnectRefused, now), Some(step));
            assert_eq!(machine.state(now + length - 1), State::Ejected);
            now += length;
        }
    }

    #[test]
    fn a_trial_that_opens_closes_it_and_time_forgives() {
        let mut machine = Machine::default();
        let (until, _) = eject(&mut machine, Cause::TlsFailed, 1);
        assert_eq!(
            machine.opened(until, until + 5),
            Some(Step::Returned { from: State::Returning, ejections: 1 })
        );
        assert_eq!(machine.state(until + 5), State::Closed);
        // A millisecond short of being forgiven.
        let mut other = machine.clone();
        assert_eq!(eject(&mut other, Cause::TlsFailed, until + 5 + 59_999).1, 2);
        assert!(!machine.is_blank(&POLICY, until + 5 + 59_999));
        assert!(machine.is_blank(&POLICY, until + 5 + 60_000));
        assert_eq!(eject(&mut machine, Cause::TlsFailed, until + 5 + 60_000).1, 1);
    }

    #[test]
    fn outcomes_of_an_earlier_state_are_not_heard() {
        let mut machine = Machine::default();
        let (until, _) = eject(&mut machine, Cause::ConnectTimeout, 1_000);
        let before = machine.clone();
        for now in [1_500, until, until + 700] {
            assert_eq!(machine.failed(Cause::ConnectTimeout, 999, now, &POLICY, || FREE), None);
            assert_eq!(machine.opened(999, now), None);
            machine.answered(999);
            assert_eq!(machine, before);
        }
        assert!(machine.opened(until, until + 700).is_some());
        for _ in 0..9 {
            assert_eq!(machine.failed(Cause::Reset, until - 1, until + 800, &POLICY, || FREE), None);
        }
    }

    #[test]
    fn a_last_resort_that_opens_closes_it_at_once() {
        let mut machine = Machine::default();
        eject(&mut machine, Cause::ConnectRefused, 1_000);
        assert_eq!(fail(&mut machine, Cause::ConnectRefused, 1_500), None, "failing on makes it no longer");
        let returned = Step::Returned { from: State::Ejected, ejections: 1 };
        assert_eq!(machine.opened(2_000, 2_100), Some(returned));
    }

    #[test]
    fn news_of_its_health_bring_the_trial_forward_and_forgive_nothing() {
        let mut machine = Machine::default();
        eject(&mut machine, Cause::ConnectRefused, 1_000);
        machine.became_eligible(4_000);
        assert_eq!(machine.state(3_999), State::Ejected);
        assert_eq!(machine.state(4_000), State::Returning);
        machine.became_eligible(5_000);
        assert_eq!(machine.until(), Some(4_000));
        let failed = fail(&mut machine, Cause::ConnectRefused, 4_000);
        assert!(matches!(failed, Some(Step::Ejected { length_ms: 20_000, .. })), "{failed:?}");
        let mut closed = Machine { failures: 2, ..Machine::default() };
        closed.became_eligible(5_000);
        assert_eq!(closed, Machine { failures: 2, ..Machine::default() });
    }

    #[test]
    fn who_reset_comes_back_with_one_reset_left() {
        let mut machine = Machine::default();
        let (until, _) = eject(&mut machine, Cause::Reset, 1);
        assert!(machine.opened(until, until).is_some());
        let mut spared = machine.clone();
        assert!(matches!(
            fail(&mut machine, Cause::Reset, until + 1),
            Some(Step::Ejected { ejections: 2, .. })
        ));
        spared.answered(until);
        assert_eq!(fail(&mut spared, Cause::Reset, until + 1), None);
    }

    #[test]
    fn the_share_is_kept_and_one_may_always_be_ejected() {
        let allowed = |ejected, endpoints| Share { ejected, endpoints }.allows_one_more(&POLICY);
        assert!(allowed(0, 1) && allowed(0, 2) && !allowed(1, 2) && !allowed(1, 3));
        assert!(allowed(1, 4) && !allowed(2, 4) && allowed(49, 100) && !allowed(50, 100));
        let full = Share { ejected: 2, endpoints: 4 };
        let mut machine = Machine { failures: 2, ..Machine::default() };
        let kept = |in_a_row| Some(Step::Kept { cause: Cause::TlsFailed, in_a_row, share: full });
        assert_eq!(machine.failed(Cause::TlsFailed, 1, 1, &POLICY, || full), kept(3));
        assert_eq!(machine.failed(Cause::TlsFailed, 2, 2, &POLICY, || full), kept(4));
        assert!(matches!(fail(&mut machine, Cause::TlsFailed, 3), Some(Step::Ejected { in_a_row: 5, .. })));
    }

    #[derive(Clone, Copy, Debug)]
    enum Act {
        Wait(u64),
        Fail(Cause),
        Open,
        Answer,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (0..70_000_u64).prop_map(Act::Wait),
            prop::sample::select(&Cause::ALL[..]).prop_map(Act::Fail),
            prop::sample::select(&Cause::ALL[..]).prop_map(Act::Fail),
            Just(Act::Open),
            Just(Act::Answer),
        ]
    }

    proptest! {
        /// Beside a naive reading of the rules, with attempts that take no time.
        #[test]
        fn it_does_what_is_written(acts in prop::collection::vec(act(), 0..120), failures in 1..5_u8) {
            let policy = OutlierPolicy { failures, ..POLICY };
            let mut machine = Machine::default();
            let (mut now, mut rows, mut lengths): (u64, [u32; 2], u64) = (1, [0, 0], 10_000);
            let mut ejected: Option<(u64, Cause)> = None;
            let mut closed_at = 0_u64;
            for act in acts {
                let before = ejected;
                match act {
                    Act::Wait(time) => now += time,
                    Act::Fail(cause) => {
                        let row = usize::from(cause == Cause::Reset);
                        let ejects = match ejected {
                            Some((until, _)) => now >= until,
                            None => {
                                rows[row] += 1;
                                rows[row] >= u32::from(failures)
                            }
                        };
                        if ejects {
                            if ejected.is_none() && now - closed_at >= 60_000 {
                                lengths = 10_000;
                            }
                            ejected = Some((now + lengths, cause));
                            lengths = (lengths * 2).min(60_000);
                            rows = [0, 0];
                        }
                        let step = machine.failed(cause, now, now, &policy, || FREE);
                        prop_assert_eq!(matches!(step, Some(Step::Ejected { .. })), ejects);
                    }
                    Act::Open => {
                        rows[0] = 0;
                        if let Some((_, cause)) = ejected.take() {
                            rows[1] = if cause == Cause::Reset { u32::from(failures) - 1 } else { 0 };
                            closed_at = now;
                        }
                        prop_assert_eq!(machine.opened(now, now).is_some(), before.is_some());
                    }
                    Act::Answer => {
                        if ejected.is_none() {
                            rows[1] = 0;
                        }
                        machine.answered(now);
                    }
                }
                let state = match ejected {
                    None => State::Closed,
                    Some((until, _)) if now < until => State::Ejected,
                    Some(_) => State::Returning,
                };
                prop_assert_eq!(machine.state(now), state);
                prop_assert_eq!(machine.until(), ejected.map(|(until, _)| until));
            }
        }
    }

    #[test]
    fn the_default_policy_is_one_that_may_be_set() {
        let policy = TrafficPolicy::default().outlier_detection;
        assert!(policy.enabled && policy.failures > 1 && policy.ejection_base_ms < policy.ejection_max_ms);
    }
}
