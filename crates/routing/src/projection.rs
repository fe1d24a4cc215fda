//! The projection: routing state, and what follows from it for every sidecar, kept up to date incrementally.
//!
//! An event touches shards, and only those are built again; touched shards change the manifests that list them, and
//! only those are encoded again. A shard's **position** is the last event that touched it, whether or not its bytes
//! came out different: so it is the same however events are batched (I2). A manifest's position is that of its
//! newest shard, and a sidecar's snapshot version is the newer of that and the event that put it into its class, so it
//! never falls (I4).
//!
//! [`Projection::recompute`] builds everything from the state alone; tests and `weft verify` hold the two against each
//! other.

mod batch;

pub use batch::Bulk;

use crate::hash::Hash;
use crate::interest::InterestClass;
use crate::manifest::{Manifest, ManifestEntry};
use crate::shard::{ShardKey, build};
use crate::state::{FoldError, RoutingState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use weft_model::membership::Upstreams;
use weft_model::{ConfigVersion, Fact, InstanceId, Position, ServiceName};

use batch::Batch;

/// A shard as it is stored and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltShard {
    /// The canonical bytes.
    pub bytes: Arc<[u8]>,
    /// Their hash.
    pub hash: Hash,
    /// The last event that touched what it is built from.
    pub position: Position,
}

/// An interest class and its newest manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// Its canonical bytes.
    pub bytes: Arc<[u8]>,
    /// Their hash.
    pub hash: Hash,
    /// The last event that touched anything in it.
    pub position: Position,
    /// Who is in it.
    pub members: BTreeSet<InstanceId>,
}

/// What one sidecar is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// The snapshot's version.
    pub version: ConfigVersion,
    /// The event that put the sidecar into its class.
    pub since: Position,
    /// Its class.
    pub class: &'a InterestClass,
    /// The class's manifest.
    pub manifest: &'a Class,
}

/// What a batch of events changed. A new epoch is not in it: it raises every sidecar's version, and changes no content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Shards that were touched. One that is no more in the projection was never built.
    pub shards: BTreeSet<ShardKey>,
    /// Classes whose manifest or members changed. One that is no more in the projection lost its last member.
    pub classes: BTreeSet<InterestClass>,
    /// Instances that joined, left or changed their class.
    pub sidecars: BTreeSet<InstanceId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sidecar {
    class: InterestClass,
    /// The event that put it there.
    since: Position,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Projection {
    state: RoutingState,
    shards: BTreeMap<ShardKey, BuiltShard>,
    classes: BTreeMap<InterestClass, Class>,
    sidecars: BTreeMap<InstanceId, Sidecar>,
    /// Which classes name a service as an upstream; those that name all are in `wildcards`.
    interested: BTreeMap<ServiceName, BTreeSet<InterestClass>>,
    wildcards: BTreeSet<InterestClass>,
}

impl Projection {
    /// The fold's state.
    #[must_use]
    pub const fn state(&self) -> &RoutingState {
        &self.state
    }

    /// The last event that was folded.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        self.state.version()
    }

    /// Every shard, by key.
    #[must_use]
    pub const fn shards(&self) -> &BTreeMap<ShardKey, BuiltShard> {
        &self.shards
    }

    /// Every interest class with at least one member.
    #[must_use]
    pub const fn classes(&self) -> &BTreeMap<InterestClass, Class> {
        &self.classes
    }

    /// Every sidecar that takes part.
    pub fn sidecars(&self) -> impl Iterator<Item = &InstanceId> {
        self.sidecars.keys()
    }

    /// What a sidecar is to run; none if it does not take part.
    #[must_use]
    pub fn wanted(&self, instance: &InstanceId) -> Option<Wanted<'_>> {
        let Sidecar { class, since } = self.sidecars.get(instance)?;
        let manifest = self.classes.get(class)?;
        let version = ConfigVersion::new(self.state.version().epoch, manifest.position.max(*since));
        Some(Wanted { version, since: *since, class, manifest })
    }

    /// Takes in the next events. Shards and manifests are built once for the whole batch.
    ///
    /// # Errors
    /// If an event is not the next one. Those before it were taken in; the projection is not to be used further.
    pub fn apply<'a>(&mut self, facts: impl IntoIterator<Item = &'a Fact>) -> Result<Changes, FoldError> {
        let mut batch = Batch::default();
        self.fold(&mut batch, facts)?;
        Ok(self.build(batch))
    }

    /// Begins a batch of many pages, for a long replay.
    #[must_use]
    pub fn into_bulk(self) -> Bulk {
        Bulk::new(self)
    }

    fn fold<'a>(
        &mut self,
        batch: &mut Batch,
        facts: impl IntoIterator<Item = &'a Fact>,
    ) -> Result<(), FoldError> {
        for fact in facts {
            let touched = self.state.apply(fact)?;
            batch.touch(&touched.shards, fact.position);
            if let Some(instance) = touched.instance
                && let Some(classes) = self.assign(instance, fact.position)
            {
                batch.changes.classes.extend(classes);
                batch.changes.sidecars.insert(instance.clone());
            }
        }
        Ok(())
    }

    fn build(&mut self, batch: Batch) -> Changes {
        let Batch { endpoints, inbound, trust, mut changes } = batch;
        let endpoints = endpoints.into_iter().map(|(service, at)| (ShardKey::Endpoints(service), at));
        let inbound = inbound.into_iter().map(|(service, at)| (ShardKey::Inbound(service), at));
        let trust = trust.map(|at| (ShardKey::Trust, at));
        for (key, position) in endpoints.chain(inbound).chain(trust) {
            self.rebuild_shard(&key, position);
            changes.classes.extend(self.classes_with(&key));
            changes.shards.insert(key);
        }
        for class in &changes.classes {
            self.rebuild_manifest(class);
        }
        changes
    }

    /// Everything, built from the state alone but for the positions, which only the log's order tells. Equal to `self`
    /// unless the incremental path has a fault.
    #[must_use]
    pub fn recompute(&self) -> Self {
        let position = |key: &ShardKey| self.shards.get(key).map(|shard| shard.position).unwrap_or_default();
        let since = |id: &InstanceId| self.sidecars.get(id).map(|sidecar| sidecar.since).unwrap_or_default();
        Self::of_state(self.state.clone(), position, since)
    }

    /// What follows from a state and the positions that only the log's order tells: of each shard the last event that
    /// touched it, of each sidecar the one that put it into its class.
    pub(crate) fn of_state(
        state: RoutingState,
        position: impl Fn(&ShardKey) -> Position,
        since: impl Fn(&InstanceId) -> Position,
    ) -> Self {
        let mut fresh = Self { state, ..Self::default() };
        let services: Vec<_> = fresh.state.services_ever().cloned().collect();
        for service in services {
            for key in [ShardKey::Endpoints(service.clone()), ShardKey::Inbound(service)] {
                fresh.rebuild_shard(&key, position(&key));
            }
        }
        fresh.rebuild_shard(&ShardKey::Trust, position(&ShardKey::Trust));
        let live: Vec<_> = fresh.state.live_instances().collect();
        for instance in &live {
            fresh.assign(instance, since(instance));
        }
        let classes: Vec<_> = fresh.classes.keys().cloned().collect();
        for class in &classes {
            fresh.rebuild_manifest(class);
        }
        fresh
    }

    /// The event that put each sidecar into its class.
    pub(crate) fn since(&self) -> impl Iterator<Item = (&InstanceId, Position)> {
        self.sidecars.iter().map(|(id, sidecar)| (id, sidecar.since))
    }

    /// Puts an instance into the class that its registration asks for. Says which classes gained or lost it; none if
    /// it stays where it is.
    fn assign(&mut self, instance: &InstanceId, position: Position) -> Option<Vec<InterestClass>> {
        let registration = self.state.membership(instance).and_then(|entry| entry.state.registration());
        let current = self.sidecars.get(instance).map(|sidecar| &sidecar.class);
        // A class is of its instance's own service, so the upstreams tell.
        if registration.map(|it| &it.upstreams) == current.map(|class| &class.upstreams) {
            return None;
        }
        let current = current.cloned();
        let wanted = registration.map(|registration| InterestClass {
            service: instance.service.clone(),
            upstreams: registration.upstreams.clone(),
        });
        if let Some(class) = &current {
            self.leave(instance, class);
        }
        if let Some(class) = &wanted {
            self.join(instance, class.clone(), position);
        }
        Some(current.into_iter().chain(wanted).collect())
    }

    fn join(&mut self, instance: &InstanceId, class: InterestClass, since: Position) {
        match &class.upstreams {
            Upstreams::All => {
                self.wildcards.insert(class.clone());
            }
            Upstreams::Only(services) => {
                for service in services {
                    self.interested.entry(service.clone()).or_default().insert(class.clone());
                }
            }
        }
        let entry = self.classes.entry(class.clone()).or_insert_with(|| Class {
            manifest: Arc::default(),
            bytes: [].into(),
            hash: Hash::of(&[]),
            position: Position::ZERO,
            members: BTreeSet::new(),
        });
        entry.members.insert(instance.clone());
        self.sidecars.insert(instance.clone(), Sidecar { class, since });
    }

    fn leave(&mut self, instance: &InstanceId, class: &InterestClass) {
        self.sidecars.remove(instance);
        let Some(entry) = self.classes.get_mut(class) else { return };
        entry.members.remove(instance);
        if !entry.members.is_empty() {
            return;
        }
        self.classes.remove(class);
        self.wildcards.remove(class);
        if let Upstreams::Only(services) = &class.upstreams {
            for service in services {
                if let Some(classes) = self.interested.get_mut(service) {
                    classes.remove(class);
                    if classes.is_empty() {
                        self.interested.remove(service);
                    }
                }
            }
        }
    }

    /// The classes whose manifest lists a shard.
    fn classes_with(&self, key: &ShardKey) -> Vec<InterestClass> {
        match key {
            ShardKey::Trust => self.classes.keys().cloned().collect(),
            ShardKey::Inbound(service) => {
                // Classes sort by service, and those that name all services first.
                let first = InterestClass { service: service.clone(), upstreams: Upstreams::All };
                let own = self.classes.range(first..).map(|(class, _)| class);
                own.take_while(|class| class.service == *service).cloned().collect()
            }
            ShardKey::Endpoints(service) => {
                let named = self.interested.get(service).into_iter().flatten();
                named.chain(&self.wildcards).cloned().collect()
            }
        }
    }

    fn rebuild_shard(&mut self, key: &ShardKey, position: Position) {
        let Some(bytes) = build::build(&self.state, key) else { return };
        let shard = BuiltShard { hash: Hash::of(&bytes), bytes: bytes.into(), position };
        self.shards.insert(key.clone(), shard);
    }

    fn rebuild_manifest(&mut self, class: &InterestClass) {
        let Some(entry) = self.classes.get_mut(class) else { return };
        let own = [ShardKey::Inbound(class.service.clone()), ShardKey::Trust];
        let listed = |key: &ShardKey| {
            let shard = self.shards.get(key)?;
            Some((key.clone(), ManifestEntry { hash: shard.hash, position: shard.position }))
        };
        let mut entries: BTreeMap<_, _> = own.iter().filter_map(listed).collect();
        match &class.upstreams {
            Upstreams::All => {
                // Shards sort by kind, so those of endpoints come first.
                let all = self.shards.keys().take_while(|key| matches!(key, ShardKey::Endpoints(_)));
                entries.extend(all.filter_map(listed));
            }
            Upstreams::Only(services) => {
                let named = services.iter().cloned().map(ShardKey::Endpoints);
                entries.extend(named.filter_map(|key| listed(&key)));
            }
        }
        let manifest = Manifest { entries };
        let (bytes, hash) = manifest.encode();
        entry.position = manifest.position();
        entry.manifest = Arc::new(manifest);
        entry.bytes = bytes.into();
        entry.hash = hash;
    }
}
