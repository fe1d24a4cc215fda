//! What a sidecar makes of what a controller tells it: take the patch, pull, refuse, keep, acknowledge. Pure: it is given what
//! came and what time it is, and says what to do next. How bytes become a snapshot is in [`take`](crate::take).
//!
//! **Order of a swap: disk, memory, cuts, ack.** The types keep it: only a snapshot that was checked is [`Taken`], only one of
//! which the disk has answered is [`Kept`], and only that is installed and acknowledged. So a restart never goes back behind what
//! took effect (I4), but for a disk that fails: then the acknowledgement says that it is not durable.
//!
//! Three drive it: the sidecar, over gRPC; the simulated sidecars of a fleet, which share what one of them has decoded; and the
//! simulation of the control plane.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use weft_model::{ConfigVersion, InstanceId, TrustDomain};
use weft_proto::v1;
use weft_routing::Snapshot;

use crate::take::{self, Refusal};

/// How often notices come until the controller says.
pub const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(5);
/// The shortest and longest heartbeat that is believed: below, a hiccup is a fault; above, a fault goes unnoticed.
const HEARTBEAT_MIN: Duration = Duration::from_millis(20);
const HEARTBEAT_MAX: Duration = Duration::from_secs(60);
/// Missed heartbeats that mean: out of touch.
pub const MISSED_MAX: u32 = 2;
/// The longest that an ack is held back, whatever a controller asks for.
const ACK_SPREAD_MAX: Duration = Duration::from_secs(10);
/// Swaps that one ack tells, of those since the last one: as many as a controller takes. There are more only if changes come
/// faster than acks, and then the next one stands for those before.
const SWAPS_MAX: usize = 32;
/// How long after registering, or connecting, a controller may still say that the instance is not registered: its fold
/// may lag. After that, somebody took it out, and it registers again.
const REGISTERED_GRACE: Duration = Duration::from_secs(5);

/// Who follows.
#[derive(Clone, Copy, Debug)]
pub struct Follower<'a> {
    /// The instance.
    pub own: &'a InstanceId,
    /// The trust domain of its leaf.
    pub trust_domain: &'a TrustDomain,
    /// The snapshot in use.
    pub current: Option<&'a Snapshot>,
}

/// One session with a controller, from its first notice to its end.
#[derive(Debug)]
pub struct Session {
    /// Since when the controller should know the instance.
    known_since: Instant,
    heartbeat: Duration,
    last_notice: Instant,
    /// The log's end, as the controller last told.
    head: Option<ConfigVersion>,
    /// When a controller that had too much to do is asked again.
    again: Option<Instant>,
    /// Over how long the controller wants acknowledgements spread.
    ack_spread: Duration,
    /// What is to be said of what was applied; the newest word is enough.
    ack: Option<(Instant, Ack)>,
    /// What was put in force when, since the last word of it; oldest first.
    swaps: VecDeque<(ConfigVersion, Instant)>,
    /// The rollout that this sidecar is a canary of.
    rollout: Option<u64>,
    /// What is applied and acknowledged as not on disk.
    unkept: Option<Arc<Snapshot>>,
}

/// What a notice comes to.
#[derive(Debug)]
pub enum Heard {
    /// What it announces is in use.
    Current,
    /// It announces nothing, or what is already known to be missed.
    Nothing,
    /// It announces what is older than what is in use, which stays.
    Older(ConfigVersion),
    /// It brought a snapshot along.
    Patched(Taken),
    /// To pull what is missed.
    Missed {
        /// Why what it brought along is not used.
        misfit: Option<Refusal>,
    },
}

/// What to ask for in a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// What differs from the snapshot in use.
    Difference,
    /// The same, of a controller that does not know that snapshot: it is told what is held.
    Lacking,
    /// All of it.
    Everything,
}

/// What the answer to a pull comes to.
#[derive(Debug)]
pub enum Pulled {
    /// It is what is in use.
    Current,
    /// A snapshot to apply.
    Taken(Taken),
    /// The controller does not know what is in use: it is to be told what is held.
    Unknown,
    /// The difference does not fit what is in use: everything is to be asked for.
    Misfit(Refusal),
    /// It is refused; what is in use stays.
    Refused(Refusal),
}

/// A snapshot that may be used: whole, this instance's own, and newer than the one in use.
#[derive(Debug)]
#[must_use]
pub struct Taken(Arc<Snapshot>);

/// A snapshot of which the disk has answered.
#[derive(Debug)]
#[must_use]
pub struct Kept {
    snapshot: Arc<Snapshot>,
    unkept: Option<String>,
}

/// What is said of a snapshot that is in force.
#[derive(Debug)]
pub struct Ack {
    /// The snapshot.
    pub applied: Arc<Snapshot>,
    /// How long it took from notice to swap.
    pub took: Duration,
    /// Why it is not durable; empty if it is.
    pub error: String,
}

impl Session {
    /// A session that begins now.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            known_since: now,
            heartbeat: HEARTBEAT_DEFAULT,
            last_notice: now,
            head: None,
            again: None,
            ack_spread: Duration::ZERO,
            ack: None,
            swaps: VecDeque::new(),
            rollout: None,
            unkept: None,
        }
    }

    /// A notice came. Says the log's end that it tells.
    pub fn noticed(&mut self, notice: &v1::Notice, now: Instant) -> Option<ConfigVersion> {
        self.last_notice = now;
        self.heartbeat =
            Duration::from_millis(notice.heartbeat_ms.into()).clamp(HEARTBEAT_MIN, HEARTBEAT_MAX);
        self.head = notice.head.as_ref().map(take::version);
        self.rollout = Some(notice.rollout).filter(|rollout| *rollout != 0);
        self.ack_spread = Duration::from_millis(notice.ack_spread_ms.into()).min(ACK_SPREAD_MAX);
        self.head
    }

    /// Whether the instance is to be registered, again or at last: the controller does not know it though it should.
    #[must_use]
    pub fn must_register(&self, notice: &v1::Notice, registered: bool, now: Instant) -> bool {
        (notice.wanted.is_none() || !registered) && now.duration_since(self.known_since) > REGISTERED_GRACE
    }

    /// The instance was registered, or could not be: the controller has time again.
    pub const fn registered(&mut self, now: Instant) {
        self.known_since = now;
    }

    /// What a notice comes to.
    #[must_use]
    pub fn hear(&self, notice: &v1::Notice, follower: Follower<'_>) -> Heard {
        self.hear_with(notice, follower, |current| {
            Ok(take::take_patch(notice, current, follower.own, follower.trust_domain)?.map(Arc::new))
        })
    }

    /// The same for whoever has a way of its own to what [`take_patch`](take::take_patch) makes.
    #[must_use]
    pub fn hear_with(
        &self,
        notice: &v1::Notice,
        follower: Follower<'_>,
        patched: impl FnOnce(&Snapshot) -> Result<Option<Arc<Snapshot>>, Refusal>,
    ) -> Heard {
        let wanted = notice.wanted.as_ref().and_then(|wanted| wanted.version.as_ref()).map(take::version);
        let Some(wanted) = wanted else { return Heard::Nothing };
        if let Some(current) = follower.current {
            if wanted == current.version && announces(notice, current) {
                return Heard::Current;
            }
            if wanted < current.version {
                return Heard::Older(wanted);
            }
        }
        // Whoever had too much to do is not asked by every notice.
        if self.again.is_some() {
            return Heard::Nothing;
        }
        let Some(current) = follower.current else { return Heard::Missed { misfit: None } };
        match patched(current) {
            Ok(Some(snapshot)) => Heard::Patched(Taken(snapshot)),
            Ok(None) => Heard::Missed { misfit: None },
            Err(refusal) => Heard::Missed { misfit: Some(refusal) },
        }
    }

    /// When the last notice came.
    #[must_use]
    pub const fn last_notice(&self) -> Instant {
        self.last_notice
    }

    /// When the controller has been silent for too long.
    #[must_use]
    pub fn silent_at(&self) -> Instant {
        self.last_notice + self.heartbeat * MISSED_MAX
    }

    /// When a controller that had too much to do is asked again.
    #[must_use]
    pub const fn again_at(&self) -> Option<Instant> {
        self.again
    }

    /// A pull begins.
    pub const fn pulling(&mut self) {
        self.again = None;
    }

    /// The controller has too much to do, or is behind: it is asked again then.
    pub const fn ask_again(&mut self, at: Instant) {
        self.again = Some(at);
    }

    /// Whether what a peer runs is news to this sidecar and to its controller.
    #[must_use]
    pub fn is_news(head: Option<ConfigVersion>, newest: ConfigVersion, ours: Option<ConfigVersion>) -> bool {
        head.is_none_or(|head| newest > head) && ours.is_none_or(|ours| newest > ours)
    }

    /// The log's end, as the controller last told.
    #[must_use]
    pub const fn head(&self) -> Option<ConfigVersion> {
        self.head
    }

    /// A snapshot is in force since `now`. It is acknowledged at a moment that is `at` (0 to 1) of the time over which the controller wants
    /// acknowledgements spread.
    pub fn applied(&mut self, kept: Kept, took: Duration, now: Instant, at: f64) {
        let Kept { snapshot, unkept } = kept;
        self.unkept = unkept.is_some().then(|| Arc::clone(&snapshot));
        let error = unkept.map(|error| format!("applied, but not durable: {error}")).unwrap_or_default();
        self.swaps.push_back((snapshot.version, now));
        if self.swaps.len() > SWAPS_MAX {
            self.swaps.pop_front();
        }
        self.ack = Some((now + self.ack_spread.mul_f64(at), Ack { applied: snapshot, took, error }));
    }

    /// Says what is in force, how long the last swap `took`, and what is wrong, if anything; with what was swapped since the last
    /// word of it. A canary says that it met with nothing; whoever has connections puts in what it met with.
    pub fn acknowledge(
        &mut self,
        applied: Option<&Snapshot>,
        took: Duration,
        error: String,
        now: Instant,
    ) -> v1::AckRequest {
        let swap = |(version, at): (ConfigVersion, Instant)| v1::Swap {
            version: Some(take::wire_version(version)),
            ago_us: u64::try_from(now.duration_since(at).as_micros()).unwrap_or(u64::MAX),
        };
        v1::AckRequest {
            applied: applied.map(take::header),
            took_ms: u32::try_from(took.as_millis()).unwrap_or(u32::MAX),
            error,
            swaps: self.swaps.drain(..).map(swap).collect(),
            evidence: self.rollout.map(|rollout| v1::Evidence { rollout, ..v1::Evidence::default() }),
            evidence_only: false,
        }
    }

    /// The rollout that this sidecar is a canary of: the event that began it.
    #[must_use]
    pub const fn rollout(&self) -> Option<u64> {
        self.rollout
    }

    /// When there is something to acknowledge.
    #[must_use]
    pub fn ack_at(&self) -> Option<Instant> {
        self.ack.as_ref().map(|(at, _)| *at)
    }

    /// What to acknowledge, once.
    pub fn take_ack(&mut self) -> Option<Ack> {
        self.ack.take().map(|(_, ack)| ack)
    }

    /// What was acknowledged as not on disk; to be acknowledged again when it is.
    #[must_use]
    pub const fn unkept(&self) -> Option<&Arc<Snapshot>> {
        self.unkept.as_ref()
    }

    /// What was not on disk is there, and that was said.
    pub fn kept(&mut self) {
        self.unkept = None;
    }
}

/// Whether the snapshot that a notice names by its version is this one by its content, too.
fn announces(notice: &v1::Notice, current: &Snapshot) -> bool {
    let announced = notice.wanted.as_ref().map(|wanted| &wanted.manifest_hash[..]).unwrap_or_default();
    current.manifest_hash.0.starts_with(announced)
}

impl Ask {
    /// The request.
    #[must_use]
    pub fn request(self, current: Option<&Snapshot>) -> v1::PullRequest {
        let told = current.filter(|_| self != Self::Everything);
        let listed = told.filter(|_| self == Self::Lacking);
        let hashes = listed.iter().flat_map(|current| current.manifest.entries());
        v1::PullRequest {
            have: told.map(take::header),
            held: hashes.map(|(_, entry)| entry.hash.prefix()).collect(),
        }
    }

    /// What the answer comes to.
    #[must_use]
    pub fn answered(self, pulled: &v1::PullResponse, follower: Follower<'_>) -> Pulled {
        let Follower { own, trust_domain, current } = follower;
        self.answered_with(pulled, follower, || {
            Ok(take::take(pulled, current, own, trust_domain)?.map(Arc::new))
        })
    }

    /// The same for whoever has a way of its own to what [`take`](take::take) makes.
    #[must_use]
    pub fn answered_with(
        self,
        pulled: &v1::PullResponse,
        follower: Follower<'_>,
        taken: impl FnOnce() -> Result<Option<Arc<Snapshot>>, Refusal>,
    ) -> Pulled {
        if pulled.held_wanted && self == Self::Difference && follower.current.is_some() {
            return Pulled::Unknown;
        }
        match taken() {
            Ok(None) => Pulled::Current,
            Ok(Some(snapshot)) => Pulled::Taken(Taken(snapshot)),
            Err(refusal @ (Refusal::Snapshot(_) | Refusal::Compression { .. } | Refusal::Key(_)))
                if follower.current.is_some() && self != Self::Everything =>
            {
                Pulled::Misfit(refusal)
            }
            Err(refusal) => Pulled::Refused(refusal),
        }
    }
}

impl Taken {
    /// The snapshot, to be written to the disk.
    #[must_use]
    pub const fn snapshot(&self) -> &Arc<Snapshot> {
        &self.0
    }

    /// The disk has answered: it has the snapshot, or not yet, for this reason. It takes effect all the same, since a sick disk
    /// is not to keep a deny from it.
    pub fn kept(self, answer: Result<(), String>) -> Kept {
        Kept { snapshot: self.0, unkept: answer.err() }
    }
}

impl Kept {
    /// The snapshot, to be put in force.
    #[must_use]
    pub const fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_routing::fixture;

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    fn notice(snapshot: &Snapshot) -> v1::Notice {
        v1::Notice {
            wanted: Some(take::header(snapshot)),
            heartbeat_ms: 5_000,
            ack_spread_ms: 1_000,
            ..v1::Notice::default()
        }
    }

    #[test]
    fn a_notice_is_compared_with_what_is_in_use() {
        let (old, new) = (fixture::snapshot(&web()), fixture::changed_snapshot(&web()));
        let (own, trust_domain) = (web(), fixture::trust_domain());
        let follower = |current| Follower { own: &own, trust_domain: &trust_domain, current };
        let now = Instant::now();
        let mut session = Session::new(now);
        assert!(matches!(session.hear(&notice(&new), follower(Some(&new))), Heard::Current));
        assert!(
            matches!(session.hear(&notice(&old), follower(Some(&new))), Heard::Older(v) if v == old.version)
        );
        assert!(matches!(session.hear(&v1::Notice::default(), follower(None)), Heard::Nothing));
        for current in [None, Some(&old)] {
            let missed = session.hear(&notice(&new), follower(current));
            assert!(matches!(missed, Heard::Missed { misfit: None }));
        }
        // A patch is checked by how its hash begins; whoever made another snapshot of it hears so from the next heartbeat.
        let mut other = notice(&new);
        other.wanted.as_mut().unwrap().manifest_hash = vec![7; 32].into();
        assert!(matches!(session.hear(&other, follower(Some(&new))), Heard::Missed { misfit: None }));
        session.ask_again(now);
        assert!(matches!(session.hear(&notice(&new), follower(Some(&old))), Heard::Nothing));
        session.pulling();
        assert!(matches!(session.hear(&notice(&new), follower(Some(&old))), Heard::Missed { .. }));
    }

    #[test]
    fn an_unknown_instance_registers_after_a_while() {
        let now = Instant::now();
        let mut session = Session::new(now);
        let later = now + REGISTERED_GRACE + Duration::from_millis(1);
        let unknown = v1::Notice::default();
        let known = notice(&fixture::snapshot(&web()));
        assert!(!session.must_register(&unknown, true, now + REGISTERED_GRACE));
        assert!(session.must_register(&unknown, true, later));
        assert!(!session.must_register(&known, true, later) && session.must_register(&known, false, later));
        session.registered(later);
        assert!(!session.must_register(&unknown, true, later));
    }

    #[test]
    fn what_the_disk_did_not_take_is_said_and_said_again_when_it_did() {
        let now = Instant::now();
        let mut session = Session::new(now);
        let snapshot = Arc::new(fixture::snapshot(&web()));
        session.noticed(&notice(&snapshot), now);
        let kept = Taken(Arc::clone(&snapshot)).kept(Err("full".into()));
        session.applied(kept, Duration::from_millis(3), now, 0.5);
        assert_eq!(session.ack_at(), Some(now + Duration::from_millis(500)));
        let ack = session.take_ack().unwrap();
        assert_eq!((ack.error.as_str(), session.ack_at()), ("applied, but not durable: full", None));
        assert_eq!(session.unkept(), Some(&snapshot));
        session.kept();
        assert_eq!(session.unkept(), None);
        let swaps =
            |session: &mut Session| session.acknowledge(None, Duration::ZERO, String::new(), now).swaps;
        let swap = v1::Swap { version: Some(take::wire_version(snapshot.version)), ago_us: 0 };
        assert_eq!(swaps(&mut session), [swap]);
        for _ in 0..2 * SWAPS_MAX {
            session.applied(Taken(Arc::clone(&snapshot)).kept(Ok(())), Duration::ZERO, now, 0.0);
        }
        assert_eq!(swaps(&mut session).len(), SWAPS_MAX);
        session.applied(Taken(snapshot).kept(Ok(())), Duration::ZERO, now, 0.0);
        assert_eq!((session.take_ack().unwrap().error.as_str(), session.unkept()), ("", None));
    }

    #[test]
    fn a_difference_that_does_not_fit_is_asked_for_as_a_whole_once() {
        let old = fixture::snapshot(&web());
        let new = fixture::changed_snapshot(&web());
        let (own, trust_domain) = (web(), fixture::trust_domain());
        let follower = Follower { own: &own, trust_domain: &trust_domain, current: Some(&old) };
        let empty = v1::PullResponse {
            header: Some(take::header(&new)),
            manifest: new.manifest_bytes().into(),
            ..v1::PullResponse::default()
        };
        assert!(matches!(Ask::Difference.answered(&empty, follower), Pulled::Misfit(_)));
        assert!(matches!(Ask::Everything.answered(&empty, follower), Pulled::Refused(_)));
        let bare = Follower { current: None, ..follower };
        assert!(matches!(Ask::Difference.answered(&empty, bare), Pulled::Refused(_)));
        assert!(Ask::Difference.request(Some(&old)).have.is_some());
        assert!(Ask::Everything.request(Some(&old)).have.is_none());

        // Whoever does not know what is in use asks once.
        let unknown = v1::PullResponse { header: empty.header.clone(), held_wanted: true, ..empty.clone() };
        assert!(matches!(Ask::Difference.answered(&unknown, follower), Pulled::Unknown));
        assert!(matches!(Ask::Lacking.answered(&unknown, follower), Pulled::Misfit(_)));
        assert!(matches!(Ask::Everything.answered(&unknown, follower), Pulled::Refused(_)));
        let told = Ask::Lacking.request(Some(&old));
        assert_eq!((told.held.len(), told.have.is_some()), (old.manifest.entries().count(), true));
        assert!(Ask::Difference.request(Some(&old)).held.is_empty());
    }
}
