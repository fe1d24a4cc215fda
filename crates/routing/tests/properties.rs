//! What must hold for every history: random commands are decided and folded, in random batches.
#![expect(clippy::unwrap_used, reason = "a value that was just encoded or decided")]

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::FileFailurePersistence;
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::health::{Health, HealthCommand, HealthReported};
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::mesh::MeshDefaults;
use weft_model::rollout::{Candidate, Evidence, Plan, RolloutCommand, WHOLE_PPM};
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, Nearness, OutlierPolicy, Subset,
    TrafficCommand, TrafficPolicy,
};
use weft_model::{
    Command, ConfigVersion, Epoch, Event, Fact, InstanceId, Name, Namespace, Port, Scope, ScopeVersion,
    SecurityScope, ServiceName, Timestamp, TrafficScope, Version, ca,
};
use weft_routing::decide::decide;
use weft_routing::verdict::{authorize, authorize_live};
use weft_routing::{
    Checkpoint, CheckpointError, EndpointsShard, FOLD_VERSION, InboundShard, Manifest, Projection,
    RoutingState, ShardKey, Snapshot,
};

/// Few names, so that commands meet each other.
const SERVICES: [&str; 4] = ["a/api", "a/db", "b/db", "b/web"];
const PORTS: [u16; 3] = [80, 443, 5432];

proptest! {
    #![proptest_config(config())]

    /// I2: however events are batched, the same log gives the same bytes; and what was kept up to date
    /// incrementally equals what is built from the state alone.
    #[test]
    fn incremental_equals_full(commands in commands(), cuts in prop::collection::vec(1..9_usize, 1..80)) {
        let facts = history(&commands);
        let mut whole = Projection::default();
        whole.apply(&facts).unwrap();
        let mut single = Projection::default();
        for fact in &facts {
            single.apply([fact]).unwrap();
        }
        let mut batched = Projection::default();
        let mut rest = facts.as_slice();
        for cut in cuts.iter().cycle() {
            let (batch, later) = rest.split_at(rest.len().min(*cut));
            batched.apply(batch).unwrap();
            if later.is_empty() {
                break;
            }
            rest = later;
        }
        prop_assert_eq!(&whole, &single);
        prop_assert_eq!(&whole, &batched);
        prop_assert_eq!(&whole, &whole.recompute());
    }

    /// I2: a bulk fold, in whatever pages, equals the incremental one: bytes, positions, and since when a sidecar is in its
    /// class.
    #[test]
    fn bulk_equals_incremental(commands in commands(), before in any::<prop::sample::Index>(), page in 1..40_usize) {
        let facts = history(&commands);
        let mut single = Projection::default();
        for fact in &facts {
            single.apply([fact]).unwrap();
        }
        let (first, rest) = facts.split_at(before.index(facts.len() + 1));
        let mut projection = Projection::default();
        projection.apply(first).unwrap();
        let mut bulk = projection.into_bulk();
        for page in rest.chunks(page) {
            bulk.apply(page).unwrap();
        }
        prop_assert_eq!(&bulk.finish(), &single);
    }

    /// I2: a checkpoint and the events after it give what all events give, at any cut; and equal projections have equal
    /// checkpoints.
    #[test]
    fn checkpoint_and_rest_equal_the_whole(commands in commands(), cut in any::<prop::sample::Index>()) {
        let facts = history(&commands);
        let mut whole = Projection::default();
        whole.apply(&facts).unwrap();
        let (first, rest) = facts.split_at(cut.index(facts.len() + 1));
        let mut projection = Projection::default();
        projection.apply(first).unwrap();
        let bytes = Checkpoint::of(&projection).encode();
        let read = Checkpoint::decode(&bytes).unwrap();
        prop_assert_eq!(read.version(), projection.version());
        let restored = read.into_projection();
        prop_assert_eq!(&restored, &projection);
        let mut bulk = restored.into_bulk();
        bulk.apply(rest).unwrap();
        let restored = bulk.finish();
        prop_assert_eq!(&restored, &whole);
        prop_assert_eq!(Checkpoint::of(&restored).encode(), Checkpoint::of(&whole).encode());
    }

    /// Bytes that are no checkpoint are refused.
    #[test]
    fn hostile_checkpoints_are_refused(
        commands in commands(),
        at in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut projection = Projection::default();
        projection.apply(&history(&commands)).unwrap();
        let bytes = Checkpoint::of(&projection).encode();
        let place = at.index(bytes.len());
        prop_assert!(Checkpoint::decode(&bytes[..place]).is_err(), "cut at {place}");
        let mut longer = bytes.clone();
        longer.extend_from_slice(&noise);
        prop_assert!(noise.is_empty() || Checkpoint::decode(&longer).is_err());
        let mut flipped = bytes.clone();
        flipped[place] ^= flip;
        let mut spliced = bytes;
        spliced.splice(place.., noise.iter().copied());
        for hostile in [flipped, spliced, noise] {
            if let Ok(taken) = Checkpoint::decode(&hostile) {
                // Nonsense, perhaps, but no panic, and a checkpoint.
                prop_assert_eq!(&Checkpoint::decode(&taken.encode()).unwrap(), &taken);
                drop(taken.into_projection());
            }
        }
    }

    /// I4: no event makes a sidecar's version fall, while it takes part.
    #[test]
    fn versions_only_rise(commands in commands()) {
        let mut projection = Projection::default();
        let mut seen: BTreeMap<InstanceId, (ConfigVersion, weft_routing::Hash)> = BTreeMap::new();
        for fact in history(&commands) {
            projection.apply([&fact]).unwrap();
            seen.retain(|instance, _| projection.wanted(instance).is_some());
            for instance in projection.sidecars() {
                let wanted = projection.wanted(instance).unwrap();
                let now = (wanted.version, wanted.class.manifest.hash());
                if let Some(before) = seen.insert(instance.clone(), now) {
                    prop_assert!(now.0 >= before.0, "{instance} fell from {} to {}", before.0, now.0);
                    prop_assert!(now.0 > before.0 || now.1 == before.1, "{instance} changed at {}", now.0);
                }
            }
        }
    }

    /// I3: what the projection offers a sidecar makes a whole snapshot, which shows exactly the state.
    #[test]
    fn snapshots_show_the_state(commands in commands()) {
        let mut projection = Projection::default();
        projection.apply(&history(&commands)).unwrap();
        let shards = projection.built().map(|(_, shard)| (shard.hash, shard.bytes.clone())).collect();
        for instance in projection.sidecars() {
            let wanted = projection.wanted(instance).unwrap();
            let manifest = &wanted.class.manifest;
            let bytes = manifest.encode();
            let snapshot = Snapshot::assemble(wanted.version, manifest.hash(), &bytes, &shards).unwrap();
            prop_assert_eq!(&snapshot.inbound.service, &instance.service);
            prop_assert_eq!(&snapshot.manifest, manifest);
            prop_assert_eq!(snapshot.manifest_bytes(), bytes);
            for (service, shard) in &snapshot.endpoints {
                check_endpoints(projection.state(), service, shard)?;
            }
        }
    }

    /// I3: a snapshot that is made from the one before and what it lacks is the one that is made from everything.
    #[test]
    fn the_next_snapshot_needs_only_what_the_last_one_lacks(commands in commands(), cut in any::<prop::sample::Index>()) {
        let history = history(&commands);
        let (before, after) = history.split_at(cut.index(history.len() + 1));
        let mut projection = Projection::default();
        projection.apply(before).unwrap();
        let earlier = projection.clone();
        projection.apply(after).unwrap();
        let shards = |projection: &Projection| -> BTreeMap<weft_routing::Hash, Arc<[u8]>> {
            projection.built().map(|(_, shard)| (shard.hash, shard.bytes.clone())).collect()
        };
        let all = shards(&projection);
        for instance in projection.sidecars() {
            let (Some(old), Some(new)) = (earlier.wanted(instance), projection.wanted(instance)) else { continue };
            let manifest = &old.class.manifest;
            let old = Snapshot::assemble(old.version, manifest.hash(), &manifest.encode(), &shards(&earlier)).unwrap();
            let (version, manifest) = (new.version, &new.class.manifest);
            let difference = manifest.since(&old.manifest);
            let changed = difference.changed.iter().map(|it| (it.key.clone(), Some(it.entry)));
            let changes: BTreeMap<_, _> =
                changed.chain(difference.removed.iter().map(|key| ((*key).clone(), None))).collect();
            let lacks = difference.changed.iter().filter(|it| it.before.map(|before| before.hash) != Some(it.entry.hash));
            let lacks: BTreeMap<_, _> = lacks.map(|it| (it.entry.hash, all[&it.entry.hash].clone())).collect();
            let next = old.next(version, manifest.hash(), &changes, &lacks).unwrap();
            prop_assert_eq!(&next, &Snapshot::assemble(version, manifest.hash(), &manifest.encode(), &all).unwrap());
            if let Some(lacking) = lacks.keys().next() {
                let fewer = lacks.iter().filter(|(hash, _)| *hash != lacking).map(|(hash, bytes)| (*hash, bytes.clone()));
                prop_assert!(old.next(version, manifest.hash(), &changes, &fewer.collect()).is_err());
            }
            if let Some(key) = changes.keys().next() {
                let mut fewer = changes.clone();
                fewer.remove(key);
                prop_assert!(old.next(version, manifest.hash(), &fewer, &lacks).is_err());
            }
        }
    }

    /// What a rollout tries is what everybody has once it is advanced, and nothing is left of it.
    #[test]
    fn an_advanced_rollout_is_what_canaries_tried(commands in commands()) {
        let (mut projection, mut now) = (Projection::default(), 0);
        projection.apply(&history(&commands)).unwrap();
        let tried: BTreeMap<_, _> =
            projection.variants().iter().map(|(key, shard)| (key.clone(), shown(key, &shard.bytes))).collect();
        prop_assert_eq!(tried.is_empty(), projection.state().running_rollout().is_none());
        let advance = Command::Rollout(RolloutCommand::Advance(Evidence::default()));
        let Ok(decisions) = decide(projection.state(), &[advance], Timestamp(0)) else { return Ok(()) };
        let mut facts = Vec::new();
        for decision in decisions {
            for event in decision.events {
                now += 1;
                facts.push(Fact {
                    epoch: Epoch(u64::MAX),
                    position: weft_model::Position(projection.version().position.0 + now),
                    version: decision.seen.next(),
                    at: Timestamp(0),
                    actor: String::new(),
                    scope: decision.scope.clone(),
                    event,
                });
            }
        }
        projection.apply(&facts).unwrap();
        prop_assert!(projection.variants().is_empty());
        prop_assert!(projection.classes().values().all(|class| !class.interest.canary));
        for (key, tried) in tried {
            prop_assert_eq!(shown(&key, &projection.shards()[&key].bytes), tried);
        }
        prop_assert_eq!(&projection, &projection.recompute());
    }

    /// I8: the evaluator agrees with a naive reading of the rules, straight from the state.
    #[test]
    fn verdicts_follow_the_rules(commands in commands()) {
        let mut projection = Projection::default();
        projection.apply(&history(&commands)).unwrap();
        for (key, shard) in projection.shards() {
            let ShardKey::Inbound(service) = key else { continue };
            let inbound = InboundShard::decode(&shard.bytes).unwrap();
            prop_assert_eq!(&inbound.encode()[..], &shard.bytes[..]);
            for source in SERVICES {
                for port in PORTS {
                    let (source, port) = (source.parse().unwrap(), Port::new(port).unwrap());
                    let verdict = authorize(&inbound, &source, port);
                    let enforced = oracle(projection.state(), service, &source, port, false);
                    let with_audit = oracle(projection.state(), service, &source, port, true);
                    let declared = projection.state().is_declared(service);
                    prop_assert_eq!(verdict.permitted(), declared && enforced);
                    prop_assert_eq!(verdict.would_refuse.is_some(), declared && enforced && !with_audit);
                    let forbidden = authorize_live(&inbound, &source, port);
                    prop_assert_eq!(forbidden.is_some(), !verdict.permitted());
                    if let Some(forbidden) = forbidden.filter(|_| declared) {
                        let spared = spared(projection.state(), service, &source, port);
                        prop_assert_eq!(forbidden.on_change, spared.unwrap_or(OnChange::Cut));
                    }
                }
            }
        }
    }

    /// Stored events are read back as they were.
    #[test]
    fn events_round_trip(commands in commands()) {
        for fact in history(&commands) {
            let payload = fact.event.payload().unwrap();
            let event = Event::decode(&fact.scope, fact.event.type_name(), fact.event.schema(), &payload).unwrap();
            prop_assert_eq!(event, fact.event);
            let scope: Scope = fact.scope.to_string().parse().unwrap();
            prop_assert_eq!(scope, fact.scope);
        }
    }

    /// Whatever a peer or a disk hands over is read or refused, never more.
    #[test]
    fn hostile_bytes_are_refused(commands in commands(), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut projection = Projection::default();
        projection.apply(&history(&commands)).unwrap();
        let Some(instance) = projection.sidecars().next() else { return Ok(()) };
        let wanted = projection.wanted(instance).unwrap();
        let (listed, hash) = (&wanted.class.manifest, wanted.class.manifest.hash());
        let shards: BTreeMap<_, _> =
            projection.built().map(|(_, shard)| (shard.hash, shard.bytes.clone())).collect();

        let mut manifest = listed.encode();
        let place = at.index(manifest.len());
        manifest[place] ^= flip;
        prop_assert!(Snapshot::assemble(wanted.version, hash, &manifest, &shards).is_err());
        // With a matching hash, a changed manifest names other shards or none: it must not get through either,
        // unless only a position changed.
        let rehashed = Manifest::decode(&manifest).map(|manifest| manifest.hash()).unwrap_or(hash);
        if let Ok(snapshot) = Snapshot::assemble(wanted.version, rehashed, &manifest, &shards) {
            let hashes =
                |manifest: &Manifest| -> Vec<_> { manifest.entries().map(|(_, entry)| entry.hash).collect() };
            prop_assert_eq!(hashes(&snapshot.manifest), hashes(listed));
        }
        for (key, entry) in listed.entries() {
            let mut bytes = shards[&entry.hash].to_vec();
            if bytes.is_empty() {
                continue;
            }
            let place = at.index(bytes.len());
            bytes[place] ^= flip;
            for decoded in [EndpointsShard::decode(&bytes).map(|it| it.encode()), InboundShard::decode(&bytes).map(|it| it.encode())] {
                prop_assert!(decoded.is_err() || decoded.is_ok_and(|canonical| canonical == bytes));
            }
            let mut damaged = shards.clone();
            damaged.insert(entry.hash, bytes.into());
            let result = Snapshot::assemble(wanted.version, hash, &listed.encode(), &damaged);
            prop_assert!(result.is_err(), "{key} was damaged and taken");
        }
    }
}

/// Cases that once failed are kept beside this file and tried first.
fn config() -> ProptestConfig {
    let found = "tests/properties.regressions.txt";
    ProptestConfig {
        cases: 128,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(found))),
        ..ProptestConfig::default()
    }
}

#[test]
fn a_checkpoint_of_another_fold_is_told_as_such() {
    let bytes = Checkpoint::of(&Projection::default()).encode();
    assert_eq!(bytes, [2, 8, u8::try_from(FOLD_VERSION).unwrap()], "a header of two bytes and no record");
    let mut other = bytes;
    other[2] += 1;
    let error = Checkpoint::decode(&other).unwrap_err();
    assert!(matches!(error, CheckpointError::Version { found } if found == FOLD_VERSION + 1));
    // A length without an end is not believed.
    assert!(Checkpoint::decode(&[0xff; 9]).is_err());
    assert!(Checkpoint::decode(&[0xff, 0xff, 0xff, 0xff, 0x0f, 8, 1]).is_err());
}

#[test]
fn a_log_that_is_out_of_order_is_refused_and_nothing_changes() {
    let commands = [Command::Service("a/api".parse().unwrap(), declare(&[80])), root()];
    let facts = history(&commands);
    let mut state = RoutingState::default();
    assert!(state.apply(&facts[1]).is_err(), "a gap");
    assert_eq!(state, RoutingState::default());
    state.apply(&facts[0]).unwrap();
    let before = state.clone();
    assert!(state.apply(&facts[0]).is_err(), "a repeat");
    assert!(state.apply(&Fact { epoch: Epoch(0), ..facts[1].clone() }).is_err(), "an older epoch");
    assert!(state.apply(&Fact { version: Version(2), ..facts[1].clone() }).is_err(), "a gap in the scope");
    assert!(state.apply(&Fact { scope: Scope::Mesh, ..facts[1].clone() }).is_err(), "another scope's event");
    assert_eq!(state, before);
}

/// What a shard says, but for where its policies stand in the log.
fn shown(key: &ShardKey, bytes: &[u8]) -> String {
    match key {
        ShardKey::Endpoints(_) => {
            let mut shard = EndpointsShard::decode(bytes).unwrap();
            shard
                .traffic
                .iter_mut()
                .chain(shard.overrides.values_mut())
                .for_each(|it| it.source = ScopeVersion::default());
            format!("{shard:?}")
        }
        ShardKey::Inbound(_) => {
            let mut shard = InboundShard::decode(bytes).unwrap();
            shard.layers.iter_mut().for_each(|it| it.source = ScopeVersion::default());
            format!("{shard:?}")
        }
        ShardKey::Trust => format!("{bytes:?}"),
    }
}

/// Decides the commands one after the other; those that a rule refuses leave no event.
fn history(commands: &[Command]) -> Vec<Fact> {
    let mut state = RoutingState::default();
    let mut facts = Vec::new();
    for (tick, command) in commands.iter().enumerate() {
        let now = Timestamp(i64::try_from(tick).unwrap());
        let Ok(decisions) = decide(&state, std::slice::from_ref(command), now) else { continue };
        for decision in decisions {
            for event in decision.events {
                let version = state.source(&decision.scope).version.next();
                let position = state.version().position.next();
                let scope = decision.scope.clone();
                let actor = format!("actor-{tick}");
                // Now and then the server was restarted.
                let epoch = Epoch(1 + tick as u64 / 17);
                let fact = Fact { epoch, position, version, at: now, actor, scope, event };
                state.apply(&fact).unwrap();
                facts.push(fact);
            }
        }
    }
    facts
}

/// The rules of verdicts, read naively.
fn oracle(
    state: &RoutingState,
    service: &ServiceName,
    source: &ServiceName,
    port: Port,
    audit: bool,
) -> bool {
    let policies: Vec<&SecurityPolicy> = [
        SecurityScope::Service(service.clone()),
        SecurityScope::Namespace(service.namespace.clone()),
        SecurityScope::Mesh,
    ]
    .iter()
    .filter_map(|scope| state.security_policy(scope)?.state.as_ref())
    .filter(|policy| audit || policy.mode == Mode::Enforce)
    .collect();
    let matches = |action| {
        policies.iter().flat_map(|policy| &policy.rules).any(|rule| {
            let from = &rule.from;
            let who =
                from.any || from.services.contains(source) || from.namespaces.contains(&source.namespace);
            rule.action == action && who && (rule.ports.is_empty() || rule.ports.contains(&port))
        })
    };
    if matches(Action::Deny) {
        return false;
    }
    if matches(Action::Allow) {
        return true;
    }
    let default = policies.iter().find_map(|policy| policy.default).unwrap_or(state.mesh().state.security);
    default == Action::Allow
}

fn check_endpoints(
    state: &RoutingState,
    service: &ServiceName,
    shard: &EndpointsShard,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(shard.address, state.address(service));
    let eligible: Vec<_> = shard.eligible().map(|endpoint| endpoint.instance.clone()).collect();
    let expected: Vec<_> = state
        .instances()
        .filter(|(id, _)| id.service == *service && state.is_declared(service))
        .filter(|(id, entry)| entry.state.as_str() == "ready" && state.health_seen(id) == Health::Healthy)
        .map(|(id, _)| id.instance.clone())
        .collect();
    prop_assert_eq!(eligible, expected);
    Ok(())
}

fn root() -> Command {
    Command::Ca(ca::RootAdded {
        trust_domain: "weft.local".parse().unwrap(),
        certificate_pem: "root".into(),
        sha256: "aa".into(),
    })
}

fn declare(ports: &[u16]) -> ServiceCommand {
    let port = |number: &u16| ServicePort {
        name: format!("p{number}").parse().unwrap(),
        port: Port::new(*number).unwrap(),
    };
    ServiceCommand::Declare(ServiceDeclared { ports: ports.iter().map(port).collect(), address: None })
}

fn commands() -> impl Strategy<Value = Vec<Command>> {
    prop::collection::vec(command(), 1..120).prop_map(|mut commands| {
        // Half of all histories would hold no snapshot without a root.
        commands.insert(0, root());
        for service in SERVICES {
            commands.insert(1, Command::Service(service.parse().unwrap(), declare(&[80, 5432])));
        }
        commands
    })
}

fn service() -> impl Strategy<Value = ServiceName> {
    select(&SERVICES[..]).prop_map(|name| name.parse().unwrap())
}

fn instance() -> impl Strategy<Value = InstanceId> {
    (service(), select(&["x", "y", "z"][..]))
        .prop_map(|(service, name)| InstanceId { service, instance: name.parse().unwrap() })
}

fn port() -> impl Strategy<Value = Port> {
    select(&PORTS[..]).prop_map(|port| Port::new(port).unwrap())
}

fn action() -> impl Strategy<Value = Action> {
    select(&[Action::Allow, Action::Deny][..])
}

fn registration() -> impl Strategy<Value = InstanceRegistered> {
    let upstreams = prop_oneof![
        Just(Upstreams::All),
        prop::collection::btree_set(service(), 0..3).prop_map(Upstreams::Only)
    ];
    let metadata = prop::collection::btree_map(
        select(&["region", "zone", "build"][..]).prop_map(str::to_owned),
        select(&["1", "2"][..]).prop_map(str::to_owned),
        0..3,
    );
    (upstreams, port(), metadata).prop_map(|(upstreams, port, metadata)| InstanceRegistered {
        address: "127.0.0.1".parse().unwrap(),
        port,
        upstreams,
        metadata,
    })
}

fn rule() -> impl Strategy<Value = Rule> {
    let from = prop_oneof![
        Just(Sources { any: true, ..Sources::default() }),
        prop::collection::btree_set(service(), 1..3)
            .prop_map(|services| Sources { services, ..Sources::default() }),
        select(&["a", "b"][..]).prop_map(|namespace| Sources {
            namespaces: [namespace.parse::<Namespace>().unwrap()].into(),
            ..Sources::default()
        }),
    ];
    (action(), from, prop::collection::btree_set(port(), 0..2)).prop_map(|(action, from, ports)| Rule {
        name: "r".parse().unwrap(),
        action,
        from,
        ports,
    })
}

/// What saves a live connection that is forbidden now, read naively; none if it is cut.
fn spared(state: &RoutingState, service: &ServiceName, source: &ServiceName, port: Port) -> Option<OnChange> {
    let mut say = None;
    let mut denied = None;
    for scope in [
        SecurityScope::Service(service.clone()),
        SecurityScope::Namespace(service.namespace.clone()),
        SecurityScope::Mesh,
    ] {
        let Some(policy) = state.security_policy(&scope).and_then(|entry| entry.state.as_ref()) else {
            continue;
        };
        if policy.mode == Mode::Audit {
            continue;
        }
        say = say.or(policy.on_change);
        for rule in
            policy.rules.iter().filter(|rule| rule.action == Action::Deny && rule.matches(source, port))
        {
            if !rule.from.any {
                return None;
            }
            let said = policy.on_change.unwrap_or(OnChange::Cut);
            denied = Some(match (denied, said) {
                (Some(OnChange::Cut), _) | (_, OnChange::Cut) => OnChange::Cut,
                (Some(OnChange::Grace(one)), OnChange::Grace(other)) => OnChange::Grace(one.min(other)),
                (Some(grace @ OnChange::Grace(_)), OnChange::Keep) => grace,
                (Some(OnChange::Keep) | None, said) => said,
            });
        }
    }
    denied.or(say)
}

fn security_policy() -> impl Strategy<Value = SecurityPolicy> {
    let mode = prop_oneof![3 => Just(Mode::Enforce), 1 => Just(Mode::Audit)];
    let on_change = prop::option::of(prop_oneof![
        Just(OnChange::Cut),
        (100..103_u32).prop_map(OnChange::Grace),
        Just(OnChange::Keep)
    ]);
    (prop::option::of(action()), mode, on_change, prop::collection::vec(rule(), 0..4)).prop_map(
        |(default, mode, on_change, rules)| {
            let named = rules
                .into_iter()
                .enumerate()
                .map(|(index, rule)| Rule { name: format!("r{index}").parse::<Name>().unwrap(), ..rule });
            SecurityPolicy { default, mode, on_change, rules: named.collect() }
        },
    )
}

fn security_scope() -> impl Strategy<Value = SecurityScope> {
    prop_oneof![
        Just(SecurityScope::Mesh),
        select(&["a", "b"][..]).prop_map(|namespace| SecurityScope::Namespace(namespace.parse().unwrap())),
        service().prop_map(SecurityScope::Service),
    ]
}

fn traffic_policy() -> impl Strategy<Value = TrafficPolicy> {
    let connect = (1..5_000_u32, 0..4_u8, 0..3_u32, 0..3_u8, 0..3_u32).prop_map(
        |(timeout_ms, retries, backoff_ms, budget_percent, budget_min_per_second)| ConnectPolicy {
            timeout_ms,
            retries,
            backoff_ms,
            budget_percent,
            budget_min_per_second,
        },
    );
    let limit = || prop::option::of(1..3_u32);
    let limits = (limit(), limit(), limit(), limit()).prop_map(
        |(endpoint_connections, endpoint_pending, service_connections, service_pending)| CircuitLimits {
            endpoint_connections,
            endpoint_pending,
            service_connections,
            service_pending,
        },
    );
    let outlier_detection = (any::<bool>(), 1..4_u8, 100..102_u32, 200..202_u32, 1..4_u8).prop_map(
        |(enabled, failures, ejection_base_ms, ejection_max_ms, ejected_percent_max)| OutlierPolicy {
            enabled,
            failures,
            ejection_base_ms,
            ejection_max_ms,
            ejected_percent_max,
        },
    );
    let time = || prop::option::of(100..102_u32);
    let connection =
        (time(), time(), time()).prop_map(|(half_open_timeout_ms, idle_timeout_ms, max_age_ms)| {
            ConnectionPolicy { half_open_timeout_ms, idle_timeout_ms, max_age_ms }
        });
    let locality = (select(&Nearness::ALL[..]), 1..101_u8)
        .prop_map(|(prefer, threshold_percent)| LocalityPolicy { prefer, threshold_percent });
    let labels = prop::collection::btree_map(
        select(&["zone", "build"][..]).prop_map(str::to_owned),
        select(&["1", "2"][..]).prop_map(str::to_owned),
        1..3,
    );
    let subset = (labels, 1..4_u16);
    // As often as not a part is what it is by default, which is written in another way.
    (
        select(&Balance::ALL[..]),
        0..3_u32,
        prop_oneof![Just(ConnectPolicy::default()), connect],
        prop_oneof![Just(CircuitLimits::default()), limits],
        prop_oneof![Just(OutlierPolicy::default()), outlier_detection],
        prop_oneof![Just(ConnectionPolicy::default()), connection],
        prop_oneof![Just(LocalityPolicy::default()), locality],
        prop::collection::vec(subset, 0..3),
    )
        .prop_map(
            |(balance, slow_start_ms, connect, limits, outlier_detection, connection, locality, subsets)| {
                let named = subsets.into_iter().enumerate().map(|(index, (labels, weight))| Subset {
                    name: format!("s{index}").parse().unwrap(),
                    labels,
                    weight,
                });
                let subsets: Vec<_> = named.collect();
                let sticky_sources = subsets.len() == 2;
                TrafficPolicy {
                    balance,
                    locality,
                    subsets,
                    sticky_sources,
                    slow_start_ms,
                    connect,
                    limits,
                    outlier_detection,
                    connection,
                }
            },
        )
}

fn policy() -> impl Strategy<Value = Command> {
    let traffic_scope = (prop::option::of(service()), service())
        .prop_map(|(source, destination)| TrafficScope { source, destination });
    let traffic =
        prop_oneof![3 => traffic_policy().prop_map(TrafficCommand::Put), 1 => Just(TrafficCommand::Delete)];
    let security = prop_oneof![3 => security_policy().prop_map(SecurityCommand::Put), 1 => Just(SecurityCommand::Delete)];
    prop_oneof![
        2 => (traffic_scope, traffic).prop_map(|(scope, command)| Command::Traffic(scope, command)),
        3 => (security_scope(), security).prop_map(|(scope, command)| Command::Security(scope, command)),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    let membership = prop_oneof![
        4 => registration().prop_map(MembershipCommand::Register),
        1 => Just(MembershipCommand::Drain),
        2 => Just(MembershipCommand::Deregister),
    ];
    let health =
        (select(&[Health::Healthy, Health::Unhealthy][..]), 1..40_u64).prop_map(|(health, revision)| {
            HealthReported { health, revision, doubt: Some(0), detail: String::new() }
        });
    let service_command = prop_oneof![
        3 => prop::collection::btree_set(select(&PORTS[..]), 1..3)
            .prop_map(|ports| declare(&ports.into_iter().collect::<Vec<_>>())),
        1 => Just(ServiceCommand::Delete),
    ];
    let policies = prop::collection::vec(policy().prop_map(|command| Candidate::of(command).unwrap()), 1..3);
    let plan = (policies, 1..=WHOLE_PPM).prop_map(|(candidates, share_ppm)| Plan {
        candidates,
        share_ppm,
        watch_ms: 5_000,
        tolerance_ppm: 0,
    });
    let evidence = Evidence { connections: 3, refused: 1, failed: 0 };
    let rollout = prop_oneof![
        2 => plan.prop_map(RolloutCommand::Begin),
        1 => Just(RolloutCommand::Advance(evidence)),
        1 => Just(RolloutCommand::Abort { reason: "no".into(), evidence }),
    ];
    prop_oneof![
        3 => rollout.prop_map(Command::Rollout),
        6 => (instance(), membership).prop_map(|(id, command)| Command::Membership(id, command)),
        6 => (instance(), health).prop_map(|(id, report)| Command::Health(id, HealthCommand::Report(report))),
        2 => (service(), service_command).prop_map(|(name, command)| Command::Service(name, command)),
        5 => policy(),
        1 => (action(), 10..2_000_u32).prop_map(|(security, bound)| {
            Command::Mesh(MeshDefaults { security, propagation_bound_ms: bound, ..MeshDefaults::default() })
        }),
    ]
}
