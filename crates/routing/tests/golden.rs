//! Scenarios: commands in, what sidecars get out. Each `golden/*.txt` is a script; what it shows must equal the
//! `*.out` file beside it, which is reviewed like code. To accept a changed outcome, run the test with
//! `WEFT_ACCEPT_GOLDEN=1` and read the diff.
//!
//! Every line of a script is one batch (`+` joins commands into one), decided and folded like in production. `show`
//! and `why` lines print.
//!
//! `golden/checkpoints` holds the hash of each scenario's checkpoint, and the version of the fold that made it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a broken script fails the test, naming its line")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;
use weft_model::health::{FlapsSummarized, Health, HealthCommand, HealthReported};
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::mesh::MeshDefaults;
use weft_model::rollout::{Candidate, Evidence, Plan, RolloutBegun, RolloutCommand};
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{Balance, ConnectPolicy, TrafficCommand, TrafficPolicy};
use weft_model::{Command, Epoch, Fact, InstanceId, Port, ServiceName, Timestamp, Version, ca};
use weft_routing::decide::decide;
use weft_routing::why::explain;
use weft_routing::{
    Checkpoint, EndpointsShard, FOLD_VERSION, Hash, InboundShard, Projection, ShardKey, Snapshot,
};

#[test]
#[expect(clippy::disallowed_methods, reason = "how a person accepts a changed outcome")]
fn scenarios() {
    let accept = std::env::var("WEFT_ACCEPT_GOLDEN").is_ok();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut scripts: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    scripts.sort();
    assert!(!scripts.is_empty());
    let mut checkpoints = BTreeMap::new();
    for script in scripts {
        let (shown, checkpoint) = run(&fs::read_to_string(&script).unwrap());
        checkpoints.insert(script.file_stem().unwrap().to_string_lossy().into_owned(), checkpoint);
        let expected = script.with_extension("out");
        if accept {
            fs::write(&expected, &shown).unwrap();
        }
        let wanted = fs::read_to_string(&expected).unwrap_or_default();
        assert!(shown == wanted, "{} shows\n{shown}\nnot\n{wanted}", script.display());
    }
    check_checkpoints(&folder.join("checkpoints"), &checkpoints, accept);
}

/// What the fold makes of the scenarios, and how it is written down, changes only together with [`FOLD_VERSION`]: else a
/// controller would go on from what another fold made. A scenario that changed for its own sake goes under another name, or
/// raises the version too.
fn check_checkpoints(file: &Path, computed: &BTreeMap<String, Hash>, accept: bool) {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut lines = text.lines().map(|line| line.split_once(' ').unwrap());
    let accepted = lines.next().map_or(0, |(_, version)| version.parse().unwrap());
    let known: BTreeMap<_, _> = lines.collect();
    if accepted == FOLD_VERSION {
        for (name, hash) in computed {
            let same = known.get(name.as_str()).is_none_or(|known| *known == hash.to_string());
            assert!(
                same,
                "{name} folds to other bytes than fold version {accepted} made of it: raise FOLD_VERSION"
            );
        }
    }
    let current: String = computed.iter().map(|(name, hash)| format!("{name} {hash}\n")).collect();
    let current = format!("fold {FOLD_VERSION}\n{current}");
    if accept {
        fs::write(file, &current).unwrap();
    }
    assert!(accept || text == current, "accept the new fold version or scenario with WEFT_ACCEPT_GOLDEN=1");
}

fn run(script: &str) -> (String, Hash) {
    let mut mesh = Mesh { projection: Projection::default(), now: Timestamp(1_000), shown: String::new() };
    for (number, line) in script.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["show", "endpoints", service] => mesh.show_endpoints(&service.parse().unwrap()),
            ["show", "inbound", service] => mesh.show_inbound(&service.parse().unwrap()),
            ["show", "variants"] => mesh.show_variants(),
            ["show", "sidecar", instance] => mesh.show_sidecar(&instance.parse().unwrap()),
            ["why", source, destination, port] => {
                mesh.why(&source.parse().unwrap(), &destination.parse().unwrap(), port.parse().unwrap());
            }
            ["wait", seconds] => {
                mesh.now = mesh.now.after(Duration::from_secs(seconds.parse().unwrap()));
            }
            _ => {
                let commands = line.split(" + ").map(|text| {
                    command(text).unwrap_or_else(|| panic!("line {}: {text:?} is not a command", number + 1))
                });
                mesh.execute(line, &commands.collect::<Vec<_>>());
            }
        }
    }
    let checkpoint = Checkpoint::of(&mesh.projection).encode();
    assert_eq!(Checkpoint::decode(&checkpoint).unwrap().into_projection(), mesh.projection);
    (mesh.shown, Hash::of(&checkpoint))
}

struct Mesh {
    projection: Projection,
    now: Timestamp,
    shown: String,
}

impl Mesh {
    fn execute(&mut self, line: &str, batch: &[Command]) {
        let now = self.now;
        let decisions = match decide(self.projection.state(), batch, now) {
            Ok(decisions) => decisions,
            Err(refused) => {
                writeln!(self.shown, "refused: {line}\n    {refused}").unwrap();
                return;
            }
        };
        let mut position = self.projection.version().position;
        let mut facts = Vec::new();
        for decision in decisions {
            for (index, event) in decision.events.into_iter().enumerate() {
                position = position.next();
                facts.push(Fact {
                    epoch: Epoch(1),
                    position,
                    version: Version(decision.seen.0 + 1 + index as u64),
                    at: now,
                    actor: "golden".into(),
                    scope: decision.scope.clone(),
                    event,
                });
            }
        }
        self.projection.apply(&facts).unwrap();
        assert_eq!(self.projection.recompute(), self.projection, "after {line}");
    }

    fn shard<T>(&self, key: &ShardKey, decode: impl Fn(&[u8]) -> T) -> Option<T> {
        self.projection.shards().get(key).map(|shard| decode(&shard.bytes))
    }

    fn show_endpoints(&mut self, service: &ServiceName) {
        let key = ShardKey::Endpoints(service.clone());
        let Some(shard) = self.shard(&key, |bytes| EndpointsShard::decode(bytes).unwrap()) else {
            writeln!(self.shown, "{key}: none").unwrap();
            return;
        };
        let position = self.projection.shards()[&key].position;
        let address = shard.address.map_or("gone".into(), |address| address.to_string());
        writeln!(self.shown, "{key} at {position}: {address}").unwrap();
        for endpoint in &shard.endpoints {
            let state = if endpoint.draining { "draining" } else { "ready" };
            let (health, eligible) = (endpoint.health.as_str(), endpoint.eligible());
            let (name, address, position) = (&endpoint.instance, endpoint.address, endpoint.position);
            writeln!(self.shown, "    {name} {address} {state} {health} eligible={eligible} by {position}")
                .unwrap();
        }
        if shard.panic {
            writeln!(self.shown, "    in panic").unwrap();
        }
        let sources = shard.overrides.iter().map(|(source, resolved)| (source.to_string(), resolved));
        for (source, resolved) in shard.traffic.iter().map(|wide| ("*".into(), wide)).chain(sources) {
            let policy = resolved.policy.clone();
            let TrafficPolicy { balance, connect, .. } = &policy;
            let (ms, retries, by) = (connect.timeout_ms, connect.retries, resolved.source.position);
            let spoken = TrafficPolicy {
                balance: *balance,
                connect: ConnectPolicy { timeout_ms: ms, retries, ..ConnectPolicy::default() },
                ..TrafficPolicy::default()
            };
            assert_eq!(policy, spoken, "no scenario says more");
            writeln!(self.shown, "    from {source}: {} {ms}ms retries={retries} by {by}", balance.as_str())
                .unwrap();
        }
    }

    fn show_inbound(&mut self, service: &ServiceName) {
        let key = ShardKey::Inbound(service.clone());
        let Some(shard) = self.shard(&key, |bytes| InboundShard::decode(bytes).unwrap()) else {
            writeln!(self.shown, "{key}: none").unwrap();
            return;
        };
        let position = self.projection.shards()[&key].position;
        writeln!(self.shown, "{key} at {position}: else {}", shard.mesh_default.as_str()).unwrap();
        for layer in &shard.layers {
            let default = layer.policy.default.map_or("unset", Action::as_str);
            let (scope, mode) = (&layer.scope, layer.policy.mode.as_str());
            let by = layer.source;
            write!(self.shown, "    {scope} v{} by {} {mode} default={default}", by.version, by.position)
                .unwrap();
            if let Some(on_change) = layer.policy.on_change {
                write!(self.shown, " on_change={on_change:?}").unwrap();
            }
            writeln!(self.shown).unwrap();
            for rule in &layer.policy.rules {
                writeln!(self.shown, "        {} {}", rule.action.as_str(), rule.name).unwrap();
            }
        }
    }

    fn show_variants(&mut self) {
        for (key, shard) in self.projection.variants() {
            writeln!(self.shown, "canaries have {key} at {}", shard.position).unwrap();
        }
        let names = |begun: &RolloutBegun| begun.canaries.iter().map(ToString::to_string).collect::<Vec<_>>();
        let canaries = self.projection.state().running_rollout().map(|(begun, _)| names(begun).join(" "));
        writeln!(self.shown, "canaries: {}", canaries.unwrap_or_else(|| "none".into())).unwrap();
    }

    fn show_sidecar(&mut self, instance: &InstanceId) {
        let Some(wanted) = self.projection.wanted(instance) else {
            writeln!(self.shown, "{instance}: takes no part").unwrap();
            return;
        };
        writeln!(self.shown, "{instance} wants {} of class {}", wanted.version, wanted.class.interest)
            .unwrap();
        for (key, entry) in wanted.class.manifest.entries() {
            writeln!(self.shown, "    {key} at {}", entry.position).unwrap();
        }
        let shards: BTreeMap<_, _> =
            self.projection.built().map(|(_, shard)| (shard.hash, shard.bytes.clone())).collect();
        let manifest = &wanted.class.manifest;
        let error = Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards).err();
        writeln!(self.shown, "    {}", error.map_or("whole".into(), |error| format!("not usable: {error}")))
            .unwrap();
    }

    fn why(&mut self, source: &ServiceName, destination: &ServiceName, port: Port) {
        let explanation = explain(&self.projection, source, destination, port).unwrap();
        writeln!(self.shown, "{}", explanation.summary).unwrap();
        for step in explanation.steps {
            let mark = if step.refusal.is_some() { "no " } else { "yes" };
            writeln!(self.shown, "    {mark} {} {}", step.question, step.answer).unwrap();
        }
    }
}

/// Reads one command of a script.
fn command(text: &str) -> Option<Command> {
    let words: Vec<_> = text.split_whitespace().collect();
    Some(match words[..] {
        ["root", domain] => Command::Ca(ca::RootAdded {
            trust_domain: domain.parse().ok()?,
            certificate_pem: format!("root of {domain}"),
            sha256: domain.into(),
        }),
        ["declare", service, ref ports @ ..] => {
            let (address, ports) = match ports {
                [rest @ .., address] if address.parse::<std::net::Ipv4Addr>().is_ok() => {
                    (address.parse().ok(), rest)
                }
                rest => (None, rest),
            };
            let ports = ports.iter().map(|port| {
                let (name, port) = port.split_once(':')?;
                Some(ServicePort { name: name.parse().ok()?, port: port.parse().ok()? })
            });
            let declared = ServiceDeclared { ports: ports.collect::<Option<_>>()?, address };
            Command::Service(service.parse().ok()?, ServiceCommand::Declare(declared))
        }
        ["delete-service", service] => Command::Service(service.parse().ok()?, ServiceCommand::Delete),
        ["register", instance, address, ref upstreams @ ..] => {
            let address: std::net::SocketAddr = address.parse().ok()?;
            let upstreams = if upstreams == ["*"] {
                Upstreams::All
            } else {
                Upstreams::Only(upstreams.iter().map(|name| name.parse().ok()).collect::<Option<_>>()?)
            };
            let registration = InstanceRegistered {
                address: address.ip(),
                port: Port::new(address.port())?,
                upstreams,
                metadata: BTreeMap::new(),
            };
            Command::Membership(instance.parse().ok()?, MembershipCommand::Register(registration))
        }
        ["drain", instance] => Command::Membership(instance.parse().ok()?, MembershipCommand::Drain),
        ["deregister", instance] => {
            Command::Membership(instance.parse().ok()?, MembershipCommand::Deregister)
        }
        ["health", instance, health, revision] => {
            let health = if health == "healthy" { Health::Healthy } else { Health::Unhealthy };
            let revision = revision.parse().ok()?;
            let report = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
            Command::Health(instance.parse().ok()?, HealthCommand::Report(report))
        }
        ["summary", instance, downs, ups, health, revision] => {
            let health = if health == "healthy" { Health::Healthy } else { Health::Unhealthy };
            let revision = revision.parse().ok()?;
            let last = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
            let (downs, ups) = (downs.parse().ok()?, ups.parse().ok()?);
            let summary = FlapsSummarized { downs, ups, over_ms: 10_000, last };
            Command::Health(instance.parse().ok()?, HealthCommand::Summarize(summary))
        }
        ["reconsider", instance] => Command::Health(instance.parse().ok()?, HealthCommand::Reconsider),
        ["traffic", scope, balance, timeout_ms, retries] => {
            let balance = match balance {
                "round_robin" => Balance::RoundRobin,
                "random" => Balance::Random,
                _ => Balance::LeastConnections,
            };
            let connect = ConnectPolicy {
                timeout_ms: timeout_ms.parse().ok()?,
                retries: retries.parse().ok()?,
                ..ConnectPolicy::default()
            };
            let policy = TrafficPolicy { balance, connect, ..TrafficPolicy::default() };
            Command::Traffic(scope.parse().ok()?, TrafficCommand::Put(policy))
        }
        ["delete-traffic", scope] => Command::Traffic(scope.parse().ok()?, TrafficCommand::Delete),
        ["security", scope, default, mode, ref rules @ ..] => {
            let policy = SecurityPolicy {
                default: action(default),
                mode: if mode.starts_with("audit") { Mode::Audit } else { Mode::Enforce },
                on_change: match mode.split_once(',').map(|(_, on_change)| on_change) {
                    Some("cut") => Some(OnChange::Cut),
                    Some("keep") => Some(OnChange::Keep),
                    Some(ms) => Some(OnChange::Grace(ms.parse().ok()?)),
                    None => None,
                },
                rules: rules.iter().map(|text| rule(text)).collect::<Option<_>>()?,
            };
            Command::Security(scope.parse().ok()?, SecurityCommand::Put(policy))
        }
        ["delete-security", scope] => Command::Security(scope.parse().ok()?, SecurityCommand::Delete),
        ["mesh", security] => {
            Command::Mesh(MeshDefaults { security: action(security)?, ..MeshDefaults::default() })
        }
        ["canary", share_ppm, ..] => {
            let policies = text.split_once(": ")?.1.split(" | ").map(|text| Candidate::of(command(text)?));
            let (candidates, share_ppm) = (policies.collect::<Option<_>>()?, share_ppm.parse().ok()?);
            Command::Rollout(RolloutCommand::Begin(Plan {
                candidates,
                share_ppm,
                watch_ms: 60_000,
                tolerance_ppm: 10_000,
            }))
        }
        ["advance"] => Command::Rollout(RolloutCommand::Advance(Evidence::default())),
        ["abort", reason] => {
            let evidence = Evidence::default();
            Command::Rollout(RolloutCommand::Abort { reason: reason.into(), evidence })
        }
        _ => return None,
    })
}

fn action(word: &str) -> Option<Action> {
    match word {
        "allow" => Some(Action::Allow),
        "deny" => Some(Action::Deny),
        _ => None,
    }
}

/// Reads `allow:name:source[:port]`, where the source is a service, a namespace, or `*`.
fn rule(text: &str) -> Option<Rule> {
    let mut parts = text.split(':');
    let action = action(parts.next()?)?;
    let name = parts.next()?.parse().ok()?;
    let from = match parts.next()? {
        "*" => Sources { any: true, ..Sources::default() },
        source if source.contains('/') => {
            Sources { services: [source.parse().ok()?].into(), ..Sources::default() }
        }
        source => Sources { namespaces: [source.parse().ok()?].into(), ..Sources::default() },
    };
    let ports = parts.map(|port| port.parse().ok()).collect::<Option<_>>()?;
    Some(Rule { name, action, from, ports })
}
