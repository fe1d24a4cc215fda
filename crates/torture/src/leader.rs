//! Several controllers, of which one leads: it is paused, killed, cut off from its lease, or everybody claims the lease at once, while
//! clients change things and sidecars follow.
//!
//! Proved of it: nobody wrote under an old term ([`audit`]); what sidecars were told was committed before, and is what the log folds to
//! at that version; no sidecar went back ([`sidecars`]); and what clients were told is in the log.

mod audit;
mod fleet;
mod sidecars;

use anyhow::Context;
use futures_util::TryStreamExt as _;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use weft_client::ControllerAddress;
use weft_eventlog::Reader;
use weft_identity::ca::CertificateAuthority;
use weft_identity::spiffe::Subject;
use weft_identity::tls::TlsIdentity;
use weft_model::{ConfigVersion, InstanceId, Position, Timestamp};
use weft_projector::Decoder;
use weft_routing::{Hash, Projection};
use weft_testkit::{Line, Passes};

use crate::controllers::{Client, Controller, Told, channel, declaration};
use crate::phase::{Findings, PROGRESS_MAX, projected, verify};
use crate::server::{Postgres, Session};
use crate::watch::read_all;

use fleet::Fleet;
use sidecars::{Seen, Sidecar};

/// Controllers: all but two may be paused at once, so that many long pauses take little time together.
const CONTROLLERS: usize = 6;
/// Sidecars that only know one controller, for each of them; they are told what it publishes when it wakes.
const BOUND: usize = 1;
/// Sidecars that go from one controller to the next.
const ROVING: usize = 4;
/// Those among them that may be cut off from all controllers.
const CUT_OFF: usize = 2;
/// For how long, in the short and in the long form: also longer than a controller takes to notice, and hundreds of events.
const CUT: [(Duration, Duration); 2] =
    [(Duration::from_secs(1), Duration::from_secs(8)), (Duration::from_secs(1), Duration::from_secs(40))];
/// Clients at once, each with a service of its own.
const CLIENTS: usize = 3;
/// Between two changes of a client.
const CLIENT_PAUSE: Duration = Duration::from_millis(10);
/// Longest wait until something new is published after a fault.
const PUBLISH_MAX: Duration = Duration::from_secs(60);
/// How long a leader is paused, in the short and in the long form; a lease lasts two seconds. Short ones are frequent.
const PAUSE: [(Duration, Duration); 2] =
    [(Duration::from_secs(3), Duration::from_secs(6)), (Duration::from_secs(10), Duration::from_secs(60))];

/// What may be done to the one that leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Fault {
    /// The leader is stopped where it is, and goes on later.
    Pause,
    /// The leader is killed, and started again.
    Kill,
    /// The leader's session for the lease is ended by the server.
    CutLease,
    /// All of the leader's sessions are ended by the server.
    CutAll,
    /// The lease is free, and everybody wants it.
    Claim,
}

impl Fault {
    /// In their shares.
    const DRAWN: [Self; 10] = [
        Self::Pause,
        Self::Pause,
        Self::Pause,
        Self::Pause,
        Self::Kill,
        Self::Kill,
        Self::CutLease,
        Self::CutAll,
        Self::Claim,
        Self::Claim,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Pause => "leader paused",
            Self::Kill => "leader killed",
            Self::CutLease => "lease session cut",
            Self::CutAll => "all sessions cut",
            Self::Claim => "all claim at once",
        }
    }
}

/// How much is done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Faults of the one that leads.
    pub(crate) rounds: u64,
    /// Only these, if there are any.
    pub(crate) only: Vec<Fault>,
    /// Times that sidecars are cut off from all controllers.
    pub(crate) cuts: u64,
    /// Pauses and cuts are long.
    pub(crate) long: bool,
}

/// All of it.
pub(crate) async fn leader(
    server: &Postgres,
    program: &Path,
    plan: &Plan,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    const DATABASE: &str = "leader";
    server.make_log(DATABASE, 2_000).await?;
    let url = server.url(DATABASE)?;
    let session = Session::open(&url).await?;
    audit::begin(&session).await?;
    let state = tempfile::tempdir()?;
    let mut controllers = Vec::new();
    for n in 1..=CONTROLLERS {
        let name = format!("controller-{n}");
        let url = server.url_of_new_login(&format!("controller_{n}"), DATABASE).await?;
        controllers.push(Controller::new(program, &name, state.path(), url)?);
    }
    let addresses: Vec<ControllerAddress> =
        controllers.iter().map(Controller::address).collect::<Result<_, _>>()?;
    let admin = controllers.first().context("there are controllers")?.clone();
    let mut fleet = Fleet::start(controllers).await?;
    let seen = Arc::new(Seen::new(Session::open(&url).await?));
    let told = Arc::new(Told::default());
    let ending = Arc::new(AtomicBool::new(false));
    let clients = start_clients(&admin, &addresses, &told, &ending).await?;
    let authority = CertificateAuthority::load(&state.path().join("ca"))?;
    let lines = Lines::to(&addresses).await?;
    let mut sidecars = Sidecars::new(authority, plan.seed, &seen, &ending);
    sidecars.start(&addresses, &lines)?;
    let credential = admin.admin().await?;
    let channels = addresses.iter().map(|address| channel(std::slice::from_ref(address), &credential));
    let mut scene = Scene {
        session,
        channels: (1..).map(|n| format!("controller-{n}")).zip(channels).collect(),
        told: Arc::clone(&told),
        port: 1_000,
        seen: Arc::clone(&seen),
        rng: StdRng::seed_from_u64(plan.seed),
    };
    scene.publishes(&fleet, None).await?;

    let drawn = Fault::DRAWN.into_iter().filter(|fault| plan.only.is_empty() || plan.only.contains(fault));
    let drawn: Vec<Fault> = drawn.collect();
    let mut times: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for round in 0..plan.rounds {
        let fault = drawn[scene.rng.random_range(0..drawn.len())];
        let took = scene.fault(fault, &mut fleet, plan.long).await;
        let took = took.with_context(|| format!("round {round}"))?;
        times.entry(format!("{}, published again", fault.name())).or_default().push(took);
        findings.count(fault.name());
        if round % 20 == 19 {
            crate::say(&format!("{} faults", round + 1));
        }
    }
    fleet.wait_awake(fleet.all()).await?;
    scene.publishes(&fleet, None).await?;
    for cut in 0..plan.cuts {
        let (kind, took) = scene.cut(&lines, &sidecars.cut_off, cut, plan.long).await?;
        times.entry("line healed, at head again".to_owned()).or_default().push(took);
        findings.count(kind);
    }
    ending.store(true, Ordering::SeqCst);
    join(clients).await?;
    for ended in fleet.ended()? {
        findings.complain(ended);
    }
    projected(&url, findings).await?;
    join(sidecars.tasks).await?;

    audit::judge(&scene.session, findings).await?;
    judge(&url, &seen, findings).await?;
    let log = read_all(&url).await?;
    findings.verdict += told.judge(&log);
    findings.acknowledged += told.acknowledged();
    findings.events += log.len() as u64;
    for (what, mut times) in times {
        times.sort();
        findings.times.insert(what, Times::of(&times));
    }
    verify(&url, findings).await
}

/// How long something took, in milliseconds.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Times {
    p50_ms: u128,
    p99_ms: u128,
    max_ms: u128,
}

impl Times {
    /// Of sorted times; at least one.
    fn of(times: &[Duration]) -> Self {
        let at = |share: usize| {
            let index = (times.len() * share).div_ceil(100).saturating_sub(1);
            times.get(index).map_or(0, Duration::as_millis)
        };
        Self { p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { p50_ms, p99_ms, max_ms } = self;
        write!(f, "{p50_ms} ms (p50), {p99_ms} ms (p99), {max_ms} ms at most")
    }
}

async fn join(mut tasks: JoinSet<anyhow::Result<()>>) -> anyhow::Result<()> {
    let all = async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    timeout(PROGRESS_MAX, all).await.context("somebody does not finish")?
}

async fn start_clients(
    admin: &Controller,
    addresses: &[ControllerAddress],
    told: &Arc<Told>,
    ending: &Arc<AtomicBool>,
) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
    let credential = admin.admin().await?;
    let mut tasks = JoinSet::new();
    for n in 0..CLIENTS {
        let mut from = addresses.to_vec();
        from.rotate_left(n % addresses.len());
        let channels = from.iter().map(|address| channel(std::slice::from_ref(address), &credential));
        let mut client = Client {
            channels: channels.collect(),
            service: format!("default/torture-{n}"),
            told: Arc::clone(told),
            pause: CLIENT_PAUSE,
        };
        // The service of a sidecar must exist before it.
        if n == 0 {
            client.insist(&declaration("default/watch", 9_000)).await.context("nothing can be declared")?;
        }
        let ending = Arc::clone(ending);
        tasks.spawn(async move {
            client.run(ending).await;
            Ok(())
        });
    }
    Ok(tasks)
}

/// Lines to all controllers.
struct Lines(Vec<Line>);

impl Lines {
    async fn to(addresses: &[ControllerAddress]) -> anyhow::Result<Self> {
        let mut lines = Vec::new();
        for address in addresses {
            lines.push(Line::to(address.to_string().parse()?).await?);
        }
        Ok(Self(lines))
    }

    fn addresses(&self) -> anyhow::Result<Vec<ControllerAddress>> {
        Ok(self.0.iter().map(|line| line.address().to_string().parse()).collect::<Result<_, _>>()?)
    }

    fn set(&self, passes: Passes) {
        self.0.iter().for_each(|line| line.set(passes));
    }
}

struct Sidecars {
    authority: CertificateAuthority,
    seed: u64,
    seen: Arc<Seen>,
    ending: Arc<AtomicBool>,
    tasks: JoinSet<anyhow::Result<()>>,
    /// How far those are that may be cut off.
    cut_off: Vec<watch::Receiver<u64>>,
}

impl Sidecars {
    fn new(authority: CertificateAuthority, seed: u64, seen: &Arc<Seen>, ending: &Arc<AtomicBool>) -> Self {
        let (seen, ending) = (Arc::clone(seen), Arc::clone(ending));
        Self { authority, seed, seen, ending, tasks: JoinSet::new(), cut_off: Vec::new() }
    }

    fn start(&mut self, addresses: &[ControllerAddress], lines: &Lines) -> anyhow::Result<()> {
        for address in addresses {
            for _ in 0..BOUND {
                self.start_one(vec![address.clone()])?;
            }
        }
        for n in 0..ROVING {
            let mut from = addresses.to_vec();
            from.rotate_left(n % addresses.len());
            self.start_one(from)?;
        }
        for _ in 0..CUT_OFF {
            let at = self.start_one(lines.addresses()?)?;
            self.cut_off.push(at);
        }
        Ok(())
    }

    fn start_one(&mut self, controllers: Vec<ControllerAddress>) -> anyhow::Result<watch::Receiver<u64>> {
        const LEAF: Duration = Duration::from_secs(24 * 3_600);
        let n = self.tasks.len();
        let instance: InstanceId = format!("default/watch/watch-{n}").parse()?;
        let now = Timestamp(jiff::Timestamp::now().as_millisecond());
        let subject = Subject::Instance(instance.clone());
        let credential = self.authority.issue_credential(&subject, now, LEAF)?;
        let (at, reached) = watch::channel(0);
        let sidecar = Sidecar {
            trust_domain: credential.spiffe_id().trust_domain.clone(),
            instance,
            who: TlsIdentity::new(credential),
            controllers,
            seen: Arc::clone(&self.seen),
            at,
            rng: StdRng::seed_from_u64(self.seed.wrapping_add(1 + n as u64)),
        };
        self.tasks.spawn(sidecar.run(Arc::clone(&self.ending)));
        Ok(reached)
    }
}

struct Scene {
    /// Of the database's owner.
    session: Session,
    /// To each controller, for an operator of its own.
    channels: Vec<(String, Channel)>,
    told: Arc<Told>,
    /// What the operator declares next.
    port: u32,
    seen: Arc<Seen>,
    rng: StdRng,
}

impl Scene {
    /// Changes something through the controllers that are awake, but for one, and waits until somebody is told of it.
    async fn publishes(&mut self, fleet: &Fleet, but: Option<&str>) -> anyhow::Result<()> {
        self.port = if self.port < 60_000 { self.port + 1 } else { 1_000 };
        let awake = self.channels.iter().filter(|(name, _)| fleet.is_awake(name) && Some(&**name) != but);
        let mut operator = Client {
            channels: awake.map(|(_, channel)| channel.clone()).collect(),
            service: "default/operator".to_owned(),
            told: Arc::clone(&self.told),
            pause: Duration::ZERO,
        };
        let published = async {
            let position = operator.insist(&declaration("default/operator", self.port)).await;
            self.seen.told_of(position.context("the operator is refused")?).await;
            anyhow::Ok(())
        };
        timeout(PUBLISH_MAX, published).await.context("nothing is published any more")?
    }

    /// The one that leads, and is not paused.
    async fn leader(&self, fleet: &mut Fleet) -> anyhow::Result<String> {
        let found = async {
            loop {
                fleet.resume_due()?;
                if let Some((_, login)) = audit::leader(&self.session).await? {
                    let name = login.replace('_', "-");
                    if fleet.is_awake(&name) {
                        return anyhow::Ok(name);
                    }
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PUBLISH_MAX, found).await.context("nobody leads")?
    }

    /// Cuts some sidecars off from all controllers for a while, and says how long they took to be where the others were when the lines
    /// were healed.
    async fn cut(
        &mut self,
        lines: &Lines,
        cut_off: &[watch::Receiver<u64>],
        number: u64,
        long: bool,
    ) -> anyhow::Result<(&'static str, Duration)> {
        let (passes, kind) = match number % 2 {
            0 => (Passes::NoConnection, "lines cut"),
            _ => (Passes::Nothing, "lines silent"),
        };
        let (shortest, longest) = CUT[usize::from(long)];
        lines.set(passes);
        sleep(shortest + (longest - shortest).mul_f64(self.rng.random())).await;
        let (healed, target) = (Instant::now(), self.seen.newest());
        lines.set(Passes::Everything);
        for at in cut_off {
            let mut at = at.clone();
            let reached = timeout(PUBLISH_MAX, at.wait_for(|at| *at >= target)).await;
            reached.context("a sidecar does not come back")?.context("a sidecar has ended")?;
        }
        Ok((kind, healed.elapsed()))
    }

    /// Does it, and says how long nothing was published.
    async fn fault(&mut self, fault: Fault, fleet: &mut Fleet, long: bool) -> anyhow::Result<Duration> {
        // Somewhere in its work, and not always right after it began.
        sleep(Duration::from_millis(self.rng.random_range(0..300))).await;
        fleet.wait_awake(3).await?;
        let leader = self.leader(fleet).await?;
        let login = leader.replace('-', "_");
        let began = Instant::now();
        match fault {
            Fault::Pause => {
                let (shortest, longest) = PAUSE[usize::from(long)];
                let share: f64 = self.rng.random();
                fleet.pause(&leader, shortest + (longest - shortest).mul_f64(share.powi(3)))?;
            }
            Fault::Kill => fleet.kill(&leader).await?,
            Fault::CutLease | Fault::CutAll => {
                const SQL: &str = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
                                   where usename = $1 and ($2 or application_name = 'weft-lease')";
                let all = fault == Fault::CutAll;
                let cut = self.session.client.query_one(SQL, &[&login, &all]).await?;
                anyhow::ensure!(cut.get::<_, i64>(0) > 0, "{leader} leads without a session");
            }
            Fault::Claim => {
                const SQL: &str =
                    "update weft.lease set expires_at = '-infinity', holder_id = gen_random_uuid()";
                self.session.client.execute(SQL, &[]).await?;
            }
        }
        let gone = matches!(fault, Fault::Pause | Fault::Kill).then_some(&*leader);
        self.publishes(fleet, gone).await?;
        let took = began.elapsed();
        if fault == Fault::Kill {
            fleet.start_again(&leader).await?;
        }
        fleet.resume_due()?;
        Ok(took)
    }
}

/// Holds what sidecars were told and took against a fold of the log, event by event.
async fn judge(url: &str, seen: &Seen, findings: &mut Findings) -> anyhow::Result<()> {
    let told = std::mem::take(&mut *seen.told());
    let mut back = 0;
    for (instance, versions) in &told.applied {
        let steps = versions.windows(2).filter(|two| two[1] <= two[0]).count();
        if steps > 0 {
            findings.complain(format!("{instance} went back {steps} times"));
        }
        back += steps as u64;
    }
    let mut by_position: BTreeMap<Position, Vec<(ConfigVersion, Hash, InstanceId)>> = BTreeMap::new();
    for snapshot in told.snapshots.iter().cloned() {
        by_position.entry(snapshot.0.position).or_default().push(snapshot);
    }
    let reader = Reader::new(url.parse()?);
    let end = reader.head().await?.position;
    let (mut projection, mut decoder, mut stale) = (Projection::default(), Decoder::default(), 0);
    let mut pages = pin!(reader.replay(Position::ZERO, end));
    while let Some(page) = pages.try_next().await? {
        for event in page.events() {
            projection.apply([&decoder.decode(&event)?])?;
            for (version, hash, instance) in by_position.remove(&event.position).unwrap_or_default() {
                let folded =
                    projection.wanted(&instance).map(|wanted| (wanted.version, wanted.class.manifest.hash()));
                if folded != Some((version, hash)) {
                    stale += 1;
                    findings.complain(format!(
                        "{instance} was told of {version}, which the log does not fold to"
                    ));
                }
            }
        }
    }
    if !by_position.is_empty() {
        findings.complain(format!("{} versions that are not in the log", by_position.len()));
    }
    if told.applied.len() < BOUND * CONTROLLERS + ROVING + CUT_OFF || told.patches == 0 || told.pulls == 0 {
        findings.complain("not every sidecar took part, so little is proved");
    }
    findings.complaints.extend(told.complaints.iter().cloned());
    let done = [
        ("stale publishes", stale + told.complaints.len() as u64),
        ("sidecars that went back", back),
        ("notices", told.notices),
        ("versions told", told.snapshots.len() as u64),
        ("streams", told.streams),
        ("patches", told.patches),
        ("pulls", told.pulls),
    ];
    findings.done.extend(done.map(|(what, count)| (what.to_owned(), count)));
    Ok(())
}
