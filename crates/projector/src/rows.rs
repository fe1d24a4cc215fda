//! The rows of the projection: which ones follow from it, and how two sets of them differ. Pure.
//!
//! Each table is a map from its primary key to the rest of the row, so that writing what a batch changed, bringing a
//! database up to date, and verifying it are the same comparison. Columns that say *when* a row was written are not
//! part of it, since they do not follow from the log.
//!
//! Called by the projector (write) and by verification (compare). SQL is in `store/`.

use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::membership::Upstreams;
use weft_model::rollout::{Evidence, RolloutAborted, RolloutAdvanced, RolloutState};
use weft_model::security::{Action, Mode, OnChange, SecurityPolicy};
use weft_model::traffic::{Nearness, OutlierPolicy, TrafficPolicy};
use weft_model::{InstanceId, Scope, SecurityScope, ServiceName, TrafficScope};
use weft_routing::damping::Damping;
use weft_routing::projection::{BuiltShard, Class};
use weft_routing::state::Entry;
use weft_routing::{Changes, ClassId, Hash, InterestClass, Projection, ShardKey};

/// One table's rows by primary key; `None` for a row that is not to be there.
pub type Table<R> = BTreeMap<String, Option<R>>;

/// A row of `weft.proxy_routing_state`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRow {
    pub(crate) position: i64,
    pub(crate) hash: Hash,
    pub(crate) body: Arc<[u8]>,
}

/// A row of `weft.interest_class`. It names what follows from its key, so it is written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassRow {
    pub(crate) service: String,
    pub(crate) upstreams: Option<String>,
    pub(crate) canary: bool,
}

/// A row of `weft.class_manifest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRow {
    pub(crate) position: i64,
    pub(crate) hash: Hash,
}

/// A row of `weft.sidecar_class`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarRow {
    pub(crate) class_id: String,
    pub(crate) since: i64,
}

/// Where a scope stands and who brought it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) version: i64,
    pub(crate) position: i64,
    pub(crate) changed_at_ms: i64,
    pub(crate) actor: String,
}

/// A row of `weft.projected_service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRow {
    pub(crate) address: Option<String>,
    pub(crate) ports: String,
    pub(crate) writer: Writer,
}

/// A row of `weft.projected_instance`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceRow {
    pub(crate) service: String,
    pub(crate) state: String,
    pub(crate) address: String,
    pub(crate) port: i32,
    pub(crate) upstreams: Option<String>,
    pub(crate) metadata: String,
    pub(crate) writer: Writer,
    pub(crate) health: String,
    pub(crate) health_revision: Option<i64>,
    pub(crate) health_detail: Option<String>,
    pub(crate) health_at_ms: Option<i64>,
    pub(crate) leaf_serial: Option<String>,
    pub(crate) leaf_not_after_ms: Option<i64>,
}

/// A row of `weft.projected_flapping`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlappingRow {
    pub(crate) penalty_milli: i64,
    pub(crate) charged_at_ms: i64,
    pub(crate) reported: String,
    pub(crate) reported_since_ms: i64,
    pub(crate) held_since_ms: Option<i64>,
    pub(crate) held_by: Option<i64>,
    pub(crate) hidden: i64,
}

/// A row of `weft.projected_policy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRow {
    pub(crate) kind: String,
    pub(crate) writer: Writer,
    pub(crate) spec: String,
    pub(crate) summary: String,
}

/// Rows of every table: all that there should be, or only those that change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowChanges {
    pub(crate) shards: Table<ShardRow>,
    pub(crate) classes: Table<ClassRow>,
    pub(crate) manifests: Table<ManifestRow>,
    pub(crate) sidecars: Table<SidecarRow>,
    pub(crate) services: Table<ServiceRow>,
    pub(crate) instances: Table<InstanceRow>,
    pub(crate) flapping: Table<FlappingRow>,
    pub(crate) policies: Table<PolicyRow>,
}

impl RowChanges {
    /// The rows that a batch of events changes.
    #[must_use]
    pub fn new<'a>(
        projection: &Projection,
        changes: &Changes,
        scopes: impl IntoIterator<Item = &'a Scope>,
    ) -> Self {
        let mut rows = Self::default();
        for key in &changes.shards {
            rows.shards.insert(key.to_string(), projection.shards().get(key).map(ShardRow::from));
        }
        for key in &changes.variants {
            rows.shards.insert(variant_name(key), projection.variants().get(key).map(ShardRow::from));
        }
        for id in &changes.classes {
            rows.put_class(projection, id);
        }
        for id in changes.manifests.union(&changes.classes) {
            rows.put_manifest(projection, id);
        }
        for instance in &changes.sidecars {
            rows.put_sidecar(projection, instance);
        }
        for scope in scopes {
            rows.put_scope(projection, scope);
        }
        rows
    }

    /// Every row that follows from a projection.
    #[must_use]
    pub fn all(projection: &Projection) -> Self {
        let state = projection.state();
        let mut rows = Self::default();
        let shard = |(key, shard): (&ShardKey, &BuiltShard)| (key.to_string(), Some(ShardRow::from(shard)));
        let variant =
            |(key, shard): (&ShardKey, &BuiltShard)| (variant_name(key), Some(ShardRow::from(shard)));
        rows.shards = projection.shards().iter().map(shard).collect();
        rows.shards.extend(projection.variants().iter().map(variant));
        for id in projection.classes().keys() {
            rows.put_class(projection, id);
            rows.put_manifest(projection, id);
        }
        projection.sidecars().for_each(|instance| rows.put_sidecar(projection, instance));
        let scopes = state
            .services()
            .map(|(service, _)| Scope::Service(service.clone()))
            .chain(state.instances().map(|(instance, _)| Scope::Membership(instance.clone())))
            .chain(state.traffic().map(|(scope, _)| Scope::Traffic(scope.clone())))
            .chain(state.security().map(|(scope, _)| Scope::Security(scope.clone())))
            .chain([Scope::Mesh, Scope::Rollout]);
        scopes.for_each(|scope| rows.put_scope(projection, &scope));
        rows.drop_absent();
        rows
    }

    /// Takes in the changes that follow.
    pub fn merge(&mut self, next: Self) {
        self.shards.extend(next.shards);
        self.classes.extend(next.classes);
        self.manifests.extend(next.manifests);
        self.sidecars.extend(next.sidecars);
        self.services.extend(next.services);
        self.instances.extend(next.instances);
        self.flapping.extend(next.flapping);
        self.policies.extend(next.policies);
    }

    /// Makes changes to all rows, as a database does: what is not to be there is not.
    pub fn write(&mut self, changes: Self) {
        self.merge(changes);
        self.drop_absent();
    }

    /// What turns `stored` into `self`, both being all rows.
    #[must_use]
    pub fn since(&self, stored: &Self) -> Self {
        Self {
            shards: difference(&stored.shards, &self.shards),
            classes: difference(&stored.classes, &self.classes),
            manifests: difference(&stored.manifests, &self.manifests),
            sidecars: difference(&stored.sidecars, &self.sidecars),
            services: difference(&stored.services, &self.services),
            instances: difference(&stored.instances, &self.instances),
            flapping: difference(&stored.flapping, &self.flapping),
            policies: difference(&stored.policies, &self.policies),
        }
    }

    /// How many rows change.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.len()
            + self.classes.len()
            + self.manifests.len()
            + self.sidecars.len()
            + self.services.len()
            + self.instances.len()
            + self.flapping.len()
            + self.policies.len()
    }

    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn put_class(&mut self, projection: &Projection, id: &ClassId) {
        let row = projection.classes().get(id).map(|class| ClassRow::from(&*class.interest));
        self.classes.insert(id.to_string(), row);
    }

    fn put_manifest(&mut self, projection: &Projection, id: &ClassId) {
        self.manifests.insert(id.to_string(), projection.classes().get(id).map(ManifestRow::from));
    }

    fn put_sidecar(&mut self, projection: &Projection, instance: &InstanceId) {
        let row = projection.wanted(instance).map(|wanted| SidecarRow {
            class_id: wanted.id.to_string(),
            since: wanted.since.0.cast_signed(),
        });
        self.sidecars.insert(instance.to_string(), row);
    }

    fn put_scope(&mut self, projection: &Projection, scope: &Scope) {
        match scope {
            Scope::Service(service) => {
                self.services.insert(service.to_string(), service_row(projection, service));
            }
            Scope::Membership(instance) | Scope::Health(instance) | Scope::Identity(instance) => {
                self.instances.insert(instance.to_string(), instance_row(projection, instance));
                let flapping = flapping_row(projection, instance);
                // Points end with the membership and with nothing else, so most events have no row to take away.
                if flapping.is_some() || matches!(scope, Scope::Membership(_)) {
                    self.flapping.insert(instance.to_string(), flapping);
                }
            }
            Scope::Traffic(traffic) => {
                self.policies.insert(scope.to_string(), traffic_row(projection, traffic));
            }
            Scope::Security(security) => {
                self.policies.insert(scope.to_string(), security_row(projection, security));
            }
            Scope::Mesh => {
                self.policies.insert(scope.to_string(), mesh_row(projection));
            }
            Scope::Rollout => {
                self.policies.insert(scope.to_string(), rollout_row(projection));
            }
            // Tokens and roots have no row: the log shows them, and the trust shard.
            Scope::Token(_) | Scope::Ca => {}
        }
    }

    fn drop_absent(&mut self) {
        self.shards.retain(|_, row| row.is_some());
        self.classes.retain(|_, row| row.is_some());
        self.manifests.retain(|_, row| row.is_some());
        self.sidecars.retain(|_, row| row.is_some());
        self.services.retain(|_, row| row.is_some());
        self.instances.retain(|_, row| row.is_some());
        self.flapping.retain(|_, row| row.is_some());
        self.policies.retain(|_, row| row.is_some());
    }
}

fn difference<R: Clone + PartialEq>(stored: &Table<R>, wanted: &Table<R>) -> Table<R> {
    let changed = wanted.iter().filter(|(key, row)| stored.get(*key) != Some(row));
    let surplus = stored.keys().filter(|key| !wanted.contains_key(*key));
    let changed = changed.map(|(key, row)| (key.clone(), row.clone()));
    changed.chain(surplus.map(|key| (key.clone(), None))).collect()
}

impl From<&BuiltShard> for ShardRow {
    fn from(shard: &BuiltShard) -> Self {
        let BuiltShard { bytes, hash, position } = shard;
        Self { position: position.0.cast_signed(), hash: *hash, body: Arc::clone(bytes) }
    }
}

impl From<&InterestClass> for ClassRow {
    fn from(interest: &InterestClass) -> Self {
        Self {
            service: interest.service.to_string(),
            upstreams: upstreams(&interest.upstreams),
            canary: interest.canary,
        }
    }
}

impl From<&Class> for ManifestRow {
    fn from(class: &Class) -> Self {
        Self { position: class.position.0.cast_signed(), hash: class.manifest.hash() }
    }
}

impl Writer {
    fn of<S>(entry: &Entry<S>) -> Self {
        Self {
            version: entry.source.version.0.cast_signed(),
            position: entry.source.position.0.cast_signed(),
            changed_at_ms: entry.at.0,
            actor: entry.actor.clone(),
        }
    }
}

fn service_row(projection: &Projection, service: &ServiceName) -> Option<ServiceRow> {
    let entry = projection.state().service(service)?;
    let declared = entry.state.as_ref()?;
    Some(ServiceRow {
        address: projection.state().address(service).map(|address| address.to_string()),
        ports: json(&declared.ports),
        writer: Writer::of(entry),
    })
}

fn instance_row(projection: &Projection, instance: &InstanceId) -> Option<InstanceRow> {
    let state = projection.state();
    let entry = state.membership(instance)?;
    let registration = entry.state.registration()?;
    let report = state.health(instance).and_then(|entry| Some((entry.at.0, entry.state.as_ref()?)));
    let leaf = state.identity(instance).and_then(|entry| entry.state.as_ref());
    Some(InstanceRow {
        service: instance.service.to_string(),
        state: entry.state.as_str().into(),
        address: registration.address.to_string(),
        port: i32::from(registration.port.number()),
        upstreams: upstreams(&registration.upstreams),
        metadata: json(&registration.metadata),
        writer: Writer::of(entry),
        health: state.health_seen(instance).as_str().into(),
        health_revision: report.map(|(_, report)| report.revision.cast_signed()),
        health_detail: report.map(|(_, report)| report.detail.clone()),
        health_at_ms: report.map(|(at, _)| at),
        leaf_serial: leaf.map(|leaf| leaf.serial.clone()),
        leaf_not_after_ms: leaf.map(|leaf| leaf.not_after.0),
    })
}

fn flapping_row(projection: &Projection, instance: &InstanceId) -> Option<FlappingRow> {
    let Damping { penalty, charged_at, reported, reported_since, held } =
        projection.state().damping(instance)?;
    Some(FlappingRow {
        penalty_milli: penalty.milli().cast_signed(),
        charged_at_ms: charged_at.0,
        reported: reported.as_str().into(),
        reported_since_ms: reported_since.0,
        held_since_ms: held.map(|held| held.since.0),
        held_by: held.map(|held| held.source.position.0.cast_signed()),
        hidden: held.map_or(0, |held| held.hidden.cast_signed()),
    })
}

fn traffic_row(projection: &Projection, scope: &TrafficScope) -> Option<PolicyRow> {
    let entry = projection.state().traffic_policy(scope)?;
    let policy = entry.state.as_ref()?;
    Some(PolicyRow {
        kind: "traffic".into(),
        writer: Writer::of(entry),
        spec: json(policy),
        summary: traffic_summary(policy),
    })
}

fn security_row(projection: &Projection, scope: &SecurityScope) -> Option<PolicyRow> {
    let entry = projection.state().security_policy(scope)?;
    let policy = entry.state.as_ref()?;
    Some(PolicyRow {
        kind: "security".into(),
        writer: Writer::of(entry),
        spec: json(policy),
        summary: security_summary(policy),
    })
}

fn mesh_row(projection: &Projection) -> Option<PolicyRow> {
    let entry = projection.state().mesh();
    if entry.source.version.0 == 0 {
        return None;
    }
    let defaults = &entry.state;
    let summary = format!(
        "default {}; changes reach everybody within {} ms; flapping endpoints are {}",
        defaults.security.as_str(),
        defaults.propagation_bound_ms,
        if defaults.damping.enabled { "damped" } else { "not damped" }
    );
    Some(PolicyRow { kind: "mesh".into(), writer: Writer::of(entry), spec: json(defaults), summary })
}

fn rollout_row(projection: &Projection) -> Option<PolicyRow> {
    let entry = projection.state().rollout();
    let summary = rollout_summary(&entry.state)?;
    Some(PolicyRow { kind: "rollout".into(), writer: Writer::of(entry), spec: json(&entry.state), summary })
}

/// The rollout of the moment in words, or how the last one ended; none if there never was one.
#[must_use]
pub fn rollout_summary(rollout: &RolloutState) -> Option<String> {
    Some(match rollout {
        RolloutState::None => return None,
        RolloutState::Running(begun) => {
            let scopes: Vec<_> = begun.candidates.iter().map(|it| it.scope().to_string()).collect();
            let (count, seconds) = (begun.canaries.len(), begun.watch_ms.div_ceil(1_000));
            format!("{count} sidecar(s) try {} for {seconds} s", scopes.join(", "))
        }
        RolloutState::Advanced(RolloutAdvanced { evidence }) => {
            format!("everybody has it, after {}", evidence_summary(evidence))
        }
        RolloutState::Aborted(RolloutAborted { reason, evidence }) => {
            format!("taken back after {}: {reason}", evidence_summary(evidence))
        }
    })
}

fn evidence_summary(evidence: &Evidence) -> String {
    let Evidence { connections, refused, failed } = evidence;
    format!("{connections} connections of canaries, {refused} refused, {failed} failed")
}

/// What the row of a variant is called; no shard is.
fn variant_name(key: &ShardKey) -> String {
    format!("canary/{key}")
}

/// A traffic policy in words, for a table. Of what seldom is said only what is not as it is by default.
#[must_use]
pub fn traffic_summary(policy: &TrafficPolicy) -> String {
    let TrafficPolicy {
        balance,
        locality,
        subsets,
        sticky_sources,
        slow_start_ms,
        connect,
        limits,
        outlier_detection,
        connection,
    } = policy;
    let usual = TrafficPolicy::default();
    let (timeout, retries) = (connect.timeout_ms, connect.retries);
    let mut parts = vec![balance.as_str().to_owned(), format!("connect {timeout} ms, {retries} retries")];
    let budget = (connect.budget_percent, connect.budget_min_per_second);
    if budget != (usual.connect.budget_percent, usual.connect.budget_min_per_second) {
        parts.push(format!("at most {} % or {}/s retries", budget.0, budget.1));
    }
    if connect.backoff_ms != usual.connect.backoff_ms {
        parts.push(format!("backoff {} ms", connect.backoff_ms));
    }
    match locality.prefer {
        Nearness::Any => {}
        Nearness::Region | Nearness::Zone => parts.push(format!(
            "prefers its {} down to {} % healthy",
            locality.prefer.as_str(),
            locality.threshold_percent
        )),
    }
    if !subsets.is_empty() {
        let parts_of: Vec<_> =
            subsets.iter().map(|subset| format!("{} {}", subset.name, subset.weight)).collect();
        let sticky = if *sticky_sources { " by source" } else { "" };
        parts.push(format!("subsets {}{sticky}", parts_of.join(", ")));
    }
    if *slow_start_ms != usual.slow_start_ms {
        parts.push(format!("slow start {slow_start_ms} ms"));
    }
    for (name, limit) in limits.all() {
        parts.extend(limit.map(|limit| format!("{name} {limit}")));
    }
    if *outlier_detection != usual.outlier_detection {
        let OutlierPolicy { enabled, failures, ejection_base_ms, ejection_max_ms, ejected_percent_max } =
            outlier_detection;
        parts.push(if *enabled {
            format!(
                "ejects after {failures} failures for {ejection_base_ms} to {ejection_max_ms} ms, at most {ejected_percent_max} %"
            )
        } else {
            "ejects nobody".to_owned()
        });
    }
    for (name, set, usual) in [
        ("half_open_timeout", connection.half_open_timeout_ms, usual.connection.half_open_timeout_ms),
        ("idle_timeout", connection.idle_timeout_ms, usual.connection.idle_timeout_ms),
        ("max_age", connection.max_age_ms, usual.connection.max_age_ms),
    ] {
        if set != usual {
            parts.push(set.map_or_else(|| format!("{name} off"), |ms| format!("{name} {ms} ms")));
        }
    }
    parts.join("; ")
}

/// A security policy in words, for a table: `default deny; allow default/api to 5432`. The first rules only.
#[must_use]
pub fn security_summary(policy: &SecurityPolicy) -> String {
    const RULES_SHOWN: usize = 3;
    let mut parts = Vec::new();
    if policy.mode == Mode::Audit {
        parts.push("audit only".to_owned());
    }
    parts.extend(policy.default.map(|default| format!("default {}", default.as_str())));
    parts.extend(policy.on_change.map(|on_change| match on_change {
        OnChange::Grace(ms) => format!("live ones get {ms} ms"),
        OnChange::Cut => "live ones are cut".to_owned(),
        OnChange::Keep => "live ones are kept".to_owned(),
    }));
    parts.extend(policy.rules.iter().take(RULES_SHOWN).map(|rule| {
        let services = rule.from.services.iter().map(ToString::to_string);
        let namespaces = rule.from.namespaces.iter().map(|namespace| format!("{namespace}/*"));
        let listed: Vec<_> = services.chain(namespaces).collect();
        let from = if rule.from.any { "everybody".to_owned() } else { listed.join(" ") };
        let preposition = if rule.action == Action::Allow { "" } else { "from " };
        let ports: Vec<_> = rule.ports.iter().map(ToString::to_string).collect();
        let ports = if ports.is_empty() { String::new() } else { format!(" to {}", ports.join(",")) };
        format!("{} {preposition}{from}{ports}", rule.action.as_str())
    }));
    if let more @ 1.. = policy.rules.len().saturating_sub(RULES_SHOWN) {
        parts.push(format!("{more} more rule(s)"));
    }
    if parts.is_empty() { "no rule and no default".into() } else { parts.join("; ") }
}

fn upstreams(upstreams: &Upstreams) -> Option<String> {
    match upstreams {
        Upstreams::All => None,
        Upstreams::Only(services) => {
            let names: Vec<_> = services.iter().map(ToString::to_string).collect();
            Some(names.join(" "))
        }
    }
}

/// Plain structs with text keys always have a JSON form, as the events that they came from had.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
