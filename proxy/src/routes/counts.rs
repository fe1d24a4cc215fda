//! What is counted of services and endpoints beside the snapshot. Threads share it: what a choice reads and every connection
//! changes is atomic; a lock is taken when an attempt fails, or when one of an endpoint that failed before succeeds, and
//! never while anything is waited for.

use super::TURNS;
use crate::balance::WARM;
use crate::balance::ewma::Ewma;
use crate::budget::Budget;
use crate::clock;
use crate::outlier::{Cause, Machine, Share, State, Step};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use weft_model::traffic::{CircuitLimits, ConnectPolicy, OutlierPolicy};

/// The warmth at the beginning of a slow start: so little that a cold endpoint is not flooded, so much that it gets warm.
const WARMTH_MIN: u64 = WARM / 10;

/// Connections to an endpoint or to a service.
#[derive(Debug, Default)]
struct Counted {
    live: AtomicU32,
    /// Those of them that are not open yet.
    pending: AtomicU32,
}

/// A limit that is reached, by its name.
pub(crate) type Full = &'static str;

/// Whose limit that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Endpoint(Full),
    Service(Full),
}

impl Counted {
    /// One more that is being opened, if the limits allow it: (all, those that are being opened), each with its name.
    fn add(&self, limits: [(Full, Option<u32>); 2]) -> Result<(), Full> {
        let [(live, most_live), (pending, most_pending)] = limits;
        add(&self.live, most_live).ok_or(live)?;
        add(&self.pending, most_pending).ok_or_else(|| {
            self.live.fetch_sub(1, Ordering::Relaxed);
            pending
        })
    }

    /// Which limit is reached; none if there is room for one more.
    fn full(&self, limits: [(Full, Option<u32>); 2]) -> Option<Full> {
        let reached = |count: &AtomicU32, (name, most): (Full, Option<u32>)| {
            most.filter(|most| count.load(Ordering::Relaxed) >= *most).map(|_| name)
        };
        reached(&self.live, limits[0]).or_else(|| reached(&self.pending, limits[1]))
    }

    fn remove(&self, pending: bool) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        if pending {
            self.pending.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// One more, unless there are as many as there may be.
fn add(count: &AtomicU32, most: Option<u32>) -> Option<()> {
    match most {
        None => {
            count.fetch_add(1, Ordering::Relaxed);
            Some(())
        }
        Some(most) => {
            let more = |count| (count < most).then_some(count + 1);
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(drop)
        }
    }
}

fn endpoint_limits(limits: &CircuitLimits) -> [(Full, Option<u32>); 2] {
    [("endpoint_connections", limits.endpoint_connections), ("endpoint_pending", limits.endpoint_pending)]
}

fn service_limits(limits: &CircuitLimits) -> [(Full, Option<u32>); 2] {
    [("service_connections", limits.service_connections), ("service_pending", limits.service_pending)]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is counted of a service, from the first snapshot that has it to the last.
#[derive(Debug, Default)]
pub(crate) struct ServiceCount {
    /// Of each level of nearness in each subset.
    pub(super) turns: [AtomicUsize; TURNS],
    /// Connections that took a turn of a subset.
    pub(super) picks: AtomicUsize,
    /// How often an endpoint was ejected or has returned.
    pub(super) ejections: AtomicU32,
    counted: Counted,
    /// Connections since the budget was asked last.
    begun: AtomicU64,
    budget: Mutex<Budget>,
    /// The endpoints that take connections. Whoever changes whether one is ejected holds the lock.
    pub(super) members: Mutex<Vec<Arc<EndpointCount>>>,
}

impl ServiceCount {
    /// A connection of the app, which earns its share of a retry.
    pub(super) fn begun(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether one more retry is in the budget; takes it.
    pub(crate) fn may_retry(&self, policy: &ConnectPolicy, now: u64) -> bool {
        let mut budget = lock(&self.budget);
        let begun = self.begun.swap(0, Ordering::Relaxed);
        budget.take(policy, begun, now)
    }
}

/// What is counted of an endpoint.
#[derive(Debug, Default)]
pub(crate) struct EndpointCount {
    counted: Counted,
    connect: AtomicU64,
    /// When its slow start began, by [`clock::uptime_ms`]; 0 for never.
    started_at: AtomicU64,
    /// When its ejection is over; 0 while it is closed.
    until: AtomicU64,
    /// A connection tries whether it works again.
    trial: AtomicBool,
    /// Whether the machine is to hear of successes.
    failed: AtomicBool,
    /// None while it has never failed, or all of that is over.
    machine: Mutex<Option<Box<Machine>>>,
}

impl EndpointCount {
    pub(super) fn live(&self) -> u64 {
        self.counted.live.load(Ordering::Relaxed).into()
    }

    /// Which limit is reached; none if there is room for one more.
    pub(super) fn full(&self, limits: &CircuitLimits) -> Option<Full> {
        self.counted.full(endpoint_limits(limits))
    }

    /// Whether it is not passed over: it is closed, or returning and nobody tries it yet.
    pub(super) fn is_sound(&self, now: u64) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == 0 || (now >= until && !self.trial.load(Ordering::Relaxed))
    }

    /// Whether it is ejected or returning.
    pub(super) fn is_ejected(&self) -> bool {
        self.until.load(Ordering::Relaxed) != 0
    }

    pub(super) fn connect_us(&self, now: u64) -> Option<u64> {
        Ewma(self.connect.load(Ordering::Relaxed)).microseconds(now)
    }

    /// It is healthy and was not: it starts slowly, and if it is ejected it may be tried.
    pub(super) fn became_eligible(&self, now: u64) {
        self.start(now);
        if let Some(machine) = &mut *lock(&self.machine) {
            machine.became_eligible(now);
            self.until.store(machine.until().unwrap_or(0), Ordering::Relaxed);
        }
    }

    /// Begins its slow start.
    fn start(&self, now: u64) {
        self.started_at.store(now, Ordering::Relaxed);
    }

    pub(super) fn warmth(&self, slow_start_ms: u32, now: u64) -> u64 {
        let (started_at, whole) = (self.started_at.load(Ordering::Relaxed), u64::from(slow_start_ms));
        let passed = now.saturating_sub(started_at);
        if started_at == 0 || passed >= whole { WARM } else { (WARM * passed / whole).max(WARMTH_MIN) }
    }

    /// What operators are shown.
    pub(crate) fn view(&self, now: u64) -> EndpointView {
        let machine = lock(&self.machine);
        let machine = machine.as_deref();
        EndpointView {
            live: self.counted.live.load(Ordering::Relaxed),
            pending: self.counted.pending.load(Ordering::Relaxed),
            connect_us: self.connect_us(now),
            outlier: machine.map_or(State::Closed, |machine| machine.state(now)).as_str(),
            failures: machine.map_or(0, Machine::in_a_row),
            ejections: machine.map_or(0, Machine::ejections),
            returns_in_ms: machine.and_then(Machine::until).map(|until| until.saturating_sub(now)),
        }
    }

    fn measured(&self, took: Duration, now: u64) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let with = |before| Some(Ewma(before).with(took, now).0);
        // Never fails: the function always has a value.
        let _ = self.connect.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with);
    }
}

/// An endpoint's counts, as operators are shown them.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct EndpointView {
    live: u32,
    pending: u32,
    connect_us: Option<u64>,
    outlier: &'static str,
    failures: u32,
    ejections: u32,
    returns_in_ms: Option<u64>,
}

/// How an endpoint came to be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It was its turn.
    Balanced,
    /// It was ejected, and is tried again.
    Trial,
    /// It is ejected, or others try it, and nothing else is left.
    LastResort,
}

/// A connection in the counts of an endpoint and its service, from its attempt to its end. What became of the attempt is told to the
/// endpoint through it.
#[derive(Debug)]
pub(crate) struct Load {
    endpoint: Arc<EndpointCount>,
    service: Arc<ServiceCount>,
    policy: OutlierPolicy,
    begun: u64,
    pending: bool,
    trial: bool,
}

impl Load {
    /// One more for both, if the limits allow it.
    pub(super) fn add(
        endpoint: &Arc<EndpointCount>,
        service: &Arc<ServiceCount>,
        limits: &CircuitLimits,
        policy: OutlierPolicy,
        now: u64,
    ) -> Result<Self, Limit> {
        service.counted.add(service_limits(limits)).map_err(Limit::Service)?;
        if let Err(full) = endpoint.counted.add(endpoint_limits(limits)) {
            service.counted.remove(true);
            return Err(Limit::Endpoint(full));
        }
        let (endpoint, service) = (Arc::clone(endpoint), Arc::clone(service));
        Ok(Self { endpoint, service, policy, begun: now, pending: true, trial: false })
    }

    /// How this endpoint is tried; none if somebody else has just begun a trial, and it is not the last resort.
    pub(super) fn begin(&mut self, last_resort: bool) -> Option<Way> {
        let until = self.endpoint.until.load(Ordering::Relaxed);
        if !self.policy.enabled || until == 0 {
            return Some(Way::Balanced);
        }
        if self.begun >= until && !self.endpoint.trial.swap(true, Ordering::Relaxed) {
            self.trial = true;
            return Some(Way::Trial);
        }
        last_resort.then_some(Way::LastResort)
    }

    pub(crate) fn service(&self) -> &ServiceCount {
        &self.service
    }

    /// The endpoint's sidecar and app took so long to answer.
    pub(crate) fn measured(&self, took: Duration) {
        self.endpoint.measured(took, clock::uptime_ms());
    }

    /// The attempt opened a connection.
    pub(crate) fn opened(&mut self) -> Option<Step> {
        self.service.counted.pending.fetch_sub(1, Ordering::Relaxed);
        self.endpoint.counted.pending.fetch_sub(1, Ordering::Relaxed);
        self.pending = false;
        if self.endpoint.failed.load(Ordering::Relaxed) { self.opened_at(clock::uptime_ms()) } else { None }
    }

    fn opened_at(&mut self, now: u64) -> Option<Step> {
        let begun = self.begun;
        let step = self.tell(now, |machine, _| machine.opened(begun, now));
        if let Some(Step::Returned { .. }) = step {
            self.endpoint.start(now);
        }
        self.end_trial();
        step
    }

    /// The attempt failed, or the connection was reset before the first byte.
    pub(crate) fn failed(&mut self, cause: Cause) -> Option<Step> {
        self.failed_at(cause, clock::uptime_ms())
    }

    fn failed_at(&mut self, cause: Cause, now: u64) -> Option<Step> {
        if cause == Cause::ConnectTimeout {
            self.endpoint.measured(Duration::from_millis(now.saturating_sub(self.begun)), now);
        }
        if !self.policy.enabled {
            return None;
        }
        let (begun, policy) = (self.begun, self.policy);
        let step = self.tell(now, |machine, share| machine.failed(cause, begun, now, &policy, share));
        self.end_trial();
        step
    }

    /// The connection had a first byte, or ended without being reset by the server.
    pub(crate) fn answered(&mut self) {
        if self.endpoint.failed.load(Ordering::Relaxed) {
            let begun = self.begun;
            self.tell(clock::uptime_ms(), |machine, _| {
                machine.answered(begun);
                None
            });
        }
    }

    /// Tells the endpoint's machine something.
    fn tell(
        &self,
        now: u64,
        something: impl FnOnce(&mut Machine, &dyn Fn() -> Share) -> Option<Step>,
    ) -> Option<Step> {
        let Self { endpoint, service, policy, .. } = self;
        // Whoever ejects one sees all others that are ejected, and nobody else ejects one meanwhile.
        let members = lock(&service.members);
        let share = || Share {
            ejected: members.iter().filter(|other| other.is_ejected()).count(),
            endpoints: members.len(),
        };
        let mut machine = lock(&endpoint.machine);
        let known = machine.get_or_insert_default();
        let step = something(known, &share);
        let until = known.until().unwrap_or(0);
        if (endpoint.until.swap(until, Ordering::Relaxed) == 0) != (until == 0) {
            service.ejections.fetch_add(1, Ordering::Relaxed);
        }
        endpoint.failed.store(known.hears_successes(), Ordering::Relaxed);
        if known.is_blank(policy, now) {
            *machine = None;
        }
        step
    }

    fn end_trial(&mut self) {
        if std::mem::take(&mut self.trial) {
            self.endpoint.trial.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end_trial();
        self.endpoint.counted.remove(self.pending);
        self.service.counted.remove(self.pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::traffic::TrafficPolicy;

    fn service(endpoints: usize) -> (Arc<ServiceCount>, Vec<Arc<EndpointCount>>) {
        let service = Arc::new(ServiceCount::default());
        let endpoints: Vec<_> = (0..endpoints).map(|_| Arc::<EndpointCount>::default()).collect();
        lock(&service.members).clone_from(&endpoints);
        (service, endpoints)
    }

    fn load(service: &Arc<ServiceCount>, endpoint: &Arc<EndpointCount>, now: u64) -> Load {
        let policy = TrafficPolicy::default();
        Load::add(endpoint, service, &policy.limits, policy.outlier_detection, now).unwrap()
    }

    /// Fails as often as it takes.
    fn eject(service: &Arc<ServiceCount>, endpoint: &Arc<EndpointCount>, now: u64) -> Option<Step> {
        let failed = || load(service, endpoint, now).failed_at(Cause::ConnectRefused, now);
        let first_two = (failed(), failed());
        failed().or(first_two.1).or(first_two.0)
    }

    #[test]
    fn limits_hold_exactly_and_what_ends_makes_room() {
        let (service, endpoints) = service(2);
        let limits = CircuitLimits {
            endpoint_connections: Some(3),
            endpoint_pending: Some(2),
            service_connections: Some(5),
            service_pending: Some(3),
        };
        let policy = OutlierPolicy::default();
        let add = |index: usize| Load::add(&endpoints[index], &service, &limits, policy, 1);
        let mut one = add(0).unwrap();
        let mut two = add(0).unwrap();
        assert_eq!(add(0).unwrap_err(), Limit::Endpoint("endpoint_pending"));
        assert_eq!(endpoints[0].full(&limits), Some("endpoint_pending"));
        let mut three = add(1).unwrap();
        assert_eq!(add(1).unwrap_err(), Limit::Service("service_pending"));
        for load in [&mut one, &mut two, &mut three] {
            load.opened();
        }
        let mut four = add(0).unwrap();
        four.opened();
        assert_eq!(add(0).unwrap_err(), Limit::Endpoint("endpoint_connections"));
        let five = add(1).unwrap();
        assert_eq!(add(1).unwrap_err(), Limit::Service("service_connections"));
        drop((one, two, three, four, five));
        for count in [&service.counted, &endpoints[0].counted, &endpoints[1].counted] {
            assert_eq!((count.live.load(Ordering::Relaxed), count.pending.load(Ordering::Relaxed)), (0, 0));
        }
        assert_eq!(endpoints[0].full(&limits), None);
    }

    #[test]
    fn threads_together_stay_within_a_limit_and_share_one_trial() {
        const THREADS: u64 = 4;
        let (service, endpoints) = service(2);
        let limits = CircuitLimits { endpoint_connections: Some(3), ..CircuitLimits::default() };
        let (policy, endpoint) = (OutlierPolicy::default(), &endpoints[0]);
        let (most, start) = (AtomicU64::new(0), std::sync::Barrier::new(4));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..2_000 {
                        let add = || Load::add(endpoint, &service, &limits, policy, 1).ok();
                        let loads = [add(), add()];
                        most.fetch_max(endpoint.live(), Ordering::Relaxed);
                        drop(loads);
                    }
                });
            }
        });
        assert_eq!((endpoint.live(), service.counted.live.load(Ordering::Relaxed)), (0, 0));
        assert!(most.load(Ordering::Relaxed) <= 3);

        eject(&service, endpoint, 5);
        let trials = AtomicU64::new(0);
        let trying: Vec<Load> = std::thread::scope(|scope| {
            let one = || {
                start.wait();
                let mut load = load(&service, endpoint, 10_005);
                trials.fetch_add(u64::from(load.begin(false) == Some(Way::Trial)), Ordering::Relaxed);
                load
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!((trials.load(Ordering::Relaxed), trying.len()), (1, 4));
    }

    #[test]
    fn an_ejected_endpoint_is_tried_by_one_connection_when_its_time_is_up() {
        let (service, endpoints) = service(3);
        let endpoint = &endpoints[0];
        assert!(matches!(eject(&service, endpoint, 5), Some(Step::Ejected { until: 10_005, .. })));
        assert!(!endpoint.is_sound(10_004) && endpoint.is_sound(10_005));
        assert_eq!(load(&service, endpoint, 10_004).begin(false), None);
        assert_eq!(load(&service, endpoint, 10_004).begin(true), Some(Way::LastResort));

        let mut trial = load(&service, endpoint, 10_005);
        assert_eq!(trial.begin(false), Some(Way::Trial));
        assert!(!endpoint.is_sound(10_005), "one at a time");
        assert_eq!(load(&service, endpoint, 10_006).begin(false), None);
        // The app gave up before it was decided.
        drop(trial);
        assert!(endpoint.is_sound(10_006));
        let mut trial = load(&service, endpoint, 10_006);
        assert_eq!(trial.begin(false), Some(Way::Trial));
        assert!(matches!(
            trial.failed_at(Cause::ConnectTimeout, 10_106),
            Some(Step::Ejected { until: 30_106, .. })
        ));
        drop(trial);

        let mut trial = load(&service, endpoint, 30_106);
        assert_eq!(trial.begin(false), Some(Way::Trial));
        assert!(matches!(trial.opened_at(30_107), Some(Step::Returned { .. })));
        assert!(endpoint.is_sound(30_107), "others come while the trial's connection lives");
        assert_eq!(load(&service, endpoint, 30_107).begin(false), Some(Way::Balanced));
        assert_eq!(endpoint.warmth(1_000, 30_107), WARMTH_MIN, "it starts slowly");
        assert_eq!((endpoint.warmth(1_000, 30_607), endpoint.warmth(1_000, 31_107)), (500, WARM));
    }

    #[test]
    fn of_a_service_no_more_are_ejected_than_its_share() {
        let (service, endpoints) = service(4);
        assert!(matches!(eject(&service, &endpoints[0], 1), Some(Step::Ejected { .. })));
        assert!(matches!(eject(&service, &endpoints[1], 1), Some(Step::Ejected { .. })));
        let share = Share { ejected: 2, endpoints: 4 };
        assert_eq!(
            eject(&service, &endpoints[2], 1),
            Some(Step::Kept { cause: Cause::ConnectRefused, in_a_row: 3, share })
        );
        assert!(endpoints[2].is_sound(2));
        // One that left the service is not counted any more.
        lock(&service.members).remove(0);
        let share = Share { ejected: 1, endpoints: 3 };
        assert_eq!(
            eject(&service, &endpoints[2], 1),
            Some(Step::Kept { cause: Cause::ConnectRefused, in_a_row: 6, share })
        );
    }

    #[test]
    fn who_succeeds_after_failures_is_forgotten() {
        let (service, endpoints) = service(1);
        let endpoint = &endpoints[0];
        load(&service, endpoint, 1).failed_at(Cause::TlsFailed, 1);
        assert!(lock(&endpoint.machine).is_some());
        load(&service, endpoint, 2).opened_at(2);
        assert!(lock(&endpoint.machine).is_none() && !endpoint.failed.load(Ordering::Relaxed));
        let policy = OutlierPolicy { enabled: false, ..OutlierPolicy::default() };
        for _ in 0..9 {
            let mut load = Load::add(endpoint, &service, &CircuitLimits::default(), policy, 3).unwrap();
            assert_eq!(load.failed_at(Cause::TlsFailed, 3), None, "switched off");
        }
    }
}
