//! The projection: routing state, and what follows from it for every sidecar, kept up to date incrementally.
//!
//! An event touches shards, and only those are built again; touched shards change the manifests that list them: one page
//! of each list of upstreams, which all classes with the same upstreams share, and a hash for each class. What
//! a batch took is counted ([`Work`]). A shard's **position** is the last event that touched it, whether or not its bytes
//! came out different: so it is the same however events are batched (I2). A manifest's position is that of its
//! newest shard, and a sidecar's snapshot version is the newer of that and the event that put it into its class, so it
//! never falls (I4).
//!
//! While a rollout runs, its canaries are in classes of their own, whose manifests list **variants** of the shards that the rollout's
//! policies concern, and for the rest what everybody's list. Sidecars do not see the difference.
//!
//! [`Projection::recompute`] builds everything from the state alone; tests and `weft verify` hold the two against each
//! other.

mod batch;
mod lists;

pub use batch::Bulk;

use crate::hash::Hash;
use crate::interest::{ClassId, InterestClass, ListId};
use crate::manifest::{Manifest, ManifestEntry};
use crate::rollout::Audience;
use crate::shard::{ShardKey, build};
use crate::state::{FoldError, RoutingState};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::sync::Arc;
use weft_model::{ConfigVersion, Fact, InstanceId, Position, ServiceName};

use batch::{Batch, Dirty};
use lists::{Lists, Touched};

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
    /// What its sidecars may see.
    pub interest: Arc<InterestClass>,
    /// The manifest.
    pub manifest: Manifest,
    /// The last event that touched anything in it.
    pub position: Position,
    /// The event that began the rollout that its members are canaries of.
    pub rollout: Option<Position>,
    /// Who is in it.
    pub members: BTreeSet<InstanceId>,
    list: ListId,
}

/// What one sidecar is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// The snapshot's version.
    pub version: ConfigVersion,
    /// The event that put the sidecar into its class.
    pub since: Position,
    /// Its class's name.
    pub id: ClassId,
    /// Its class, with the manifest.
    pub class: &'a Class,
}

/// What a batch of events changed. A new epoch is not in it: it raises every sidecar's version, and changes no content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Shards that were touched. One that is no more in the projection was never built.
    pub shards: BTreeSet<ShardKey>,
    /// Those of which canaries have, or had, variants that were touched.
    pub variants: BTreeSet<ShardKey>,
    /// Classes that got their first member, or lost their last one and are no more in the projection.
    pub classes: BTreeSet<ClassId>,
    /// Classes whose manifest was made anew.
    pub manifests: BTreeSet<ClassId>,
    /// Instances that joined, left or changed their class.
    pub sidecars: BTreeSet<InstanceId>,
    /// What it took.
    pub work: Work,
}

/// What a batch of events took to follow, in things that were made anew: it grows with what changed, not with the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Shards that were built, encoded and hashed.
    pub shards: usize,
    /// Lists of upstreams in which pages were encoded and hashed.
    pub lists: usize,
    /// Manifests whose pages' hashes were hashed.
    pub manifests: usize,
}

impl AddAssign for Work {
    fn add_assign(&mut self, more: Self) {
        let Self { shards, lists, manifests } = more;
        self.shards += shards;
        self.lists += lists;
        self.manifests += manifests;
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sidecar {
    class: ClassId,
    /// The event that put it there.
    since: Position,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Projection {
    state: RoutingState,
    shards: BTreeMap<ShardKey, BuiltShard>,
    /// What canaries have instead.
    variants: BTreeMap<ShardKey, BuiltShard>,
    classes: BTreeMap<ClassId, Class>,
    sidecars: BTreeMap<InstanceId, Sidecar>,
    lists: Lists,
    /// The classes of each service.
    of_service: BTreeMap<ServiceName, BTreeSet<ClassId>>,
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

    /// The shards that canaries of the running rollout have instead, by key.
    #[must_use]
    pub const fn variants(&self) -> &BTreeMap<ShardKey, BuiltShard> {
        &self.variants
    }

    /// Everything that some sidecar has, by key: what everybody has, then what canaries have instead.
    pub fn built(&self) -> impl Iterator<Item = (&ShardKey, &BuiltShard)> {
        self.shards.iter().chain(&self.variants)
    }

    /// Every interest class with at least one member.
    #[must_use]
    pub const fn classes(&self) -> &BTreeMap<ClassId, Class> {
        &self.classes
    }

    /// Every sidecar that takes part.
    pub fn sidecars(&self) -> impl Iterator<Item = &InstanceId> {
        self.sidecars.keys()
    }

    /// What a sidecar is to run; none if it does not take part.
    #[must_use]
    pub fn wanted(&self, instance: &InstanceId) -> Option<Wanted<'_>> {
        let Sidecar { class: id, since } = self.sidecars.get(instance)?;
        let class = self.classes.get(id)?;
        let version = ConfigVersion::new(self.state.version().epoch, class.position.max(*since));
        Some(Wanted { version, since: *since, id: *id, class })
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
            if let Some(instance) = touched.instance {
                self.assign(batch, instance, fact.position);
            }
            if let Some(rollout) = &touched.rollout {
                batch.variants.extend(RoutingState::variants(rollout));
                for canary in &rollout.canaries {
                    self.assign(batch, canary, fact.position);
                }
            }
        }
        Ok(())
    }

    fn build(&mut self, batch: Batch) -> Changes {
        let Batch { endpoints, inbound, trust, mut variants, new_lists, mut changes } = batch;
        let mut dirty = Dirty { lists: new_lists, ..Dirty::default() };
        let endpoints = endpoints.into_iter().map(|(service, at)| (ShardKey::Endpoints(service), at));
        let inbound = inbound.into_iter().map(|(service, at)| (ShardKey::Inbound(service), at));
        let trust = trust.map(|at| (ShardKey::Trust, at));
        for (key, position) in endpoints.chain(inbound).chain(trust) {
            if self.rebuild_shard(&key, position) {
                changes.work.shards += 1;
                self.mark(&mut dirty, &key);
            }
            if self.state.has_variant(&key) {
                variants.insert(key.clone());
            }
            changes.shards.insert(key);
        }
        for key in variants {
            changes.work.shards += usize::from(self.rebuild_variant(&key));
            self.mark_canaries(&mut dirty, &key);
            changes.variants.insert(key);
        }
        self.rebuild_manifests(dirty, &mut changes);
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
        let mut batch = Batch::default();
        if let Some((rollout, _)) = fresh.state.running_rollout() {
            batch.variants = RoutingState::variants(rollout);
        }
        for instance in &live {
            fresh.assign(&mut batch, instance, since(instance));
        }
        fresh.build(batch);
        fresh
    }

    /// The event that put each sidecar into its class.
    pub(crate) fn since(&self) -> impl Iterator<Item = (&InstanceId, Position)> {
        self.sidecars.iter().map(|(id, sidecar)| (id, sidecar.since))
    }

    /// Puts an instance into the class that its registration asks for, if it is not there.
    fn assign(&mut self, batch: &mut Batch, instance: &InstanceId, position: Position) {
        let registration = self.state.membership(instance).and_then(|entry| entry.state.registration());
        let current = self.sidecars.get(instance).and_then(|sidecar| self.classes.get(&sidecar.class));
        let canary = self.state.is_canary(instance);
        // A class is of its instance's own service, so the rest tells.
        let here = current.map(|class| (&class.interest.upstreams, class.interest.canary));
        if registration.map(|it| (&it.upstreams, canary)) == here {
            return;
        }
        let wanted = registration.map(|registration| InterestClass {
            service: instance.service.clone(),
            upstreams: registration.upstreams.clone(),
            canary,
        });
        if let Some(sidecar) = self.sidecars.remove(instance) {
            self.leave(batch, instance, sidecar.class);
        }
        if let Some(class) = wanted {
            self.join(batch, instance, class, position);
        }
        batch.changes.sidecars.insert(instance.clone());
    }

    fn join(&mut self, batch: &mut Batch, instance: &InstanceId, class: InterestClass, since: Position) {
        let id = class.id();
        let entry = self.classes.entry(id).or_insert_with(|| {
            let list = ListId::of(&class);
            if self.lists.join(list, &class, id) {
                batch.new_lists.insert(list, Touched::Everything);
            }
            self.of_service.entry(class.service.clone()).or_default().insert(id);
            batch.changes.classes.insert(id);
            let begun = self.state.running_rollout().filter(|_| class.canary);
            Class {
                interest: Arc::new(class),
                manifest: Manifest::default(),
                position: Position::ZERO,
                rollout: begun.map(|(_, source)| source.position),
                members: BTreeSet::new(),
                list,
            }
        });
        entry.members.insert(instance.clone());
        self.sidecars.insert(instance.clone(), Sidecar { class: id, since });
    }

    fn leave(&mut self, batch: &mut Batch, instance: &InstanceId, id: ClassId) {
        let Entry::Occupied(mut entry) = self.classes.entry(id) else { return };
        entry.get_mut().members.remove(instance);
        if !entry.get().members.is_empty() {
            return;
        }
        let class = entry.remove();
        self.lists.leave(class.list, &class.interest, id);
        if let Entry::Occupied(mut classes) = self.of_service.entry(class.interest.service.clone()) {
            classes.get_mut().remove(&id);
            if classes.get().is_empty() {
                classes.remove();
            }
        }
        batch.changes.classes.insert(id);
    }

    /// Notes whose manifest lists a shard.
    fn mark(&self, dirty: &mut Dirty, key: &ShardKey) {
        match key {
            ShardKey::Endpoints(service) => {
                self.lists.naming(service).for_each(|list| dirty.touch(list, key));
            }
            ShardKey::Inbound(service) => {
                dirty.own.extend(self.of_service.get(service).into_iter().flatten());
            }
            ShardKey::Trust => dirty.own.extend(self.classes.keys()),
        }
    }

    /// The same of canaries' alone.
    fn mark_canaries(&self, dirty: &mut Dirty, key: &ShardKey) {
        let is_canary = |id: &&ClassId| self.classes.get(id).is_some_and(|class| class.interest.canary);
        match key {
            ShardKey::Endpoints(service) => {
                self.lists.naming(service).filter(|list| self.lists.is_canary(*list)).for_each(|list| {
                    dirty.touch(list, key);
                });
            }
            ShardKey::Inbound(service) => {
                dirty.own.extend(self.of_service.get(service).into_iter().flatten().filter(is_canary));
            }
            ShardKey::Trust => {}
        }
    }

    /// Builds a shard, if there is something to build it from.
    fn rebuild_shard(&mut self, key: &ShardKey, position: Position) -> bool {
        let Some(bytes) = build::build(&self.state, key, Audience::Everybody) else { return false };
        self.shards.insert(key.clone(), BuiltShard::new(bytes, position));
        true
    }

    /// Builds what canaries have instead of a shard, or forgets it if there is no such thing any more. It is touched by what
    /// touches the shard, and by the rollout's begin.
    fn rebuild_variant(&mut self, key: &ShardKey) -> bool {
        let begun = self.state.running_rollout().filter(|_| self.state.has_variant(key));
        let position = begun.map(|(_, source)| source.position);
        let position = position.zip(self.shards.get(key)).map(|(begun, shard)| begun.max(shard.position));
        let bytes = position.and_then(|_| build::build(&self.state, key, Audience::Canaries));
        let Some((bytes, position)) = bytes.zip(position) else {
            self.variants.remove(key);
            return false;
        };
        self.variants.insert(key.clone(), BuiltShard::new(bytes, position));
        true
    }

    fn rebuild_manifests(&mut self, Dirty { lists, mut own }: Dirty, changes: &mut Changes) {
        let mut manifests = BTreeSet::new();
        for (list, touched) in lists {
            let built = Built { shards: &self.shards, variants: &self.variants };
            changes.work.lists += usize::from(self.lists.rebuild(list, &touched, &built));
            manifests.extend(self.lists.classes(list));
        }
        own.extend(changes.classes.iter().filter(|id| self.classes.contains_key(id)));
        manifests.extend(&own);
        for id in &manifests {
            let Some(class) = self.classes.get_mut(id) else { continue };
            let upstreams = self.lists.pages(class.list);
            class.manifest = if own.contains(id) {
                let keys = [ShardKey::Inbound(class.interest.service.clone()), ShardKey::Trust];
                let built = Built { shards: &self.shards, variants: &self.variants };
                let listed = keys.into_iter().filter_map(|key| {
                    let entry = built.listed(&key, class.interest.canary)?;
                    Some((key, entry))
                });
                Manifest::of(upstreams, listed.collect())
            } else {
                class.manifest.with_upstreams(upstreams)
            };
            class.position = class.manifest.position();
        }
        changes.work.manifests += manifests.len();
        changes.manifests = manifests;
    }
}

impl BuiltShard {
    fn new(bytes: Vec<u8>, position: Position) -> Self {
        Self { hash: Hash::of(&bytes), bytes: bytes.into(), position }
    }
}

/// What was built.
struct Built<'a> {
    shards: &'a BTreeMap<ShardKey, BuiltShard>,
    variants: &'a BTreeMap<ShardKey, BuiltShard>,
}

impl Built<'_> {
    /// What a manifest lists of a shard, a canary's or everybody's.
    fn listed(&self, key: &ShardKey, canary: bool) -> Option<ManifestEntry> {
        let variant = self.variants.get(key).filter(|_| canary);
        let shard = variant.or_else(|| self.shards.get(key))?;
        Some(ManifestEntry { hash: shard.hash, position: shard.position })
    }
}
