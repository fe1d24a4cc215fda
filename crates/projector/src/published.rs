//! What sidecars may be told: the projection as of a checkpoint that a projector has committed.
//!
//! The fold runs ahead of the checkpoint, because commands are decided against its head. So what each batch changed is
//! kept as a [`Delta`] until the checkpoint covers it, and only then becomes part of [`Published`]. Bytes are shared
//! with the projection; nothing is copied but keys.
//!
//! **Patches.** What changed in a class since one of its former manifests, if that is little: of each changed shard the run of bytes
//! that changed if it is short, else the new bytes compressed with the former ones as a dictionary. So one endpoint's change
//! takes a dozen bytes whatever the service's size. Made when first asked for, then the same bytes for everybody. Whoever is too far behind, or lacks a shard altogether, pulls.
//!
//! **Feeds.** Each class has one, which tells its subscribers that something changed for them; the others sleep on.
//!
//! **Announcements.** Which classes were given which version when, for whoever follows how it reaches their sidecars.
//!
//! Called by the view. Read by Subscribe, Pull and the acknowledgements of the API.

mod announced;

pub use announced::Announced;

use bytes::Bytes;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::watch;
use tokio::time::Instant;
use weft_eventlog::{EventHash, Point};
use weft_model::{ConfigVersion, InstanceId, Position, Scope};
use weft_routing::manifest::Changed;
use weft_routing::projection::{BuiltShard, Class, Work};
use weft_routing::{Changes, ClassId, Hash, Manifest, Projection, ShardKey, Splice};

use crate::rows::RowChanges;

use announced::Announcements;

/// Former manifests that are remembered per class, to answer a pull with a difference. A sidecar that is further behind
/// than so many changes gets everything, which is then not much more.
pub const MANIFESTS_REMEMBERED: usize = 32;

/// Former bytes of a shard that are remembered, to make patches from: those of the last changes, which everybody has who
/// follows; and of a large shard no more than so many bytes.
const FORMER_MAX: usize = 4;
const FORMER_BYTES_MAX: usize = 4 << 20;

/// Longest patch. What is larger is pulled: then a notice never holds up the next one for long.
const PATCH_BYTES_MAX: usize = 8 << 10;

/// Longest run of changed bytes that is told as it is. It is shorter than any compressed frame with its header.
const SPLICE_BYTES_MAX: usize = 24;

/// Compression of shards: the default level; higher ones cost several times the time for a few percent.
const ZSTD_LEVEL: i32 = 3;

/// What a batch of events changed, ready to be stored and published.
#[derive(Clone, Debug, Default)]
pub struct Delta {
    /// The last event of the batch.
    pub version: ConfigVersion,
    /// Its chain hash; none if nothing was folded.
    pub hash: Option<EventHash>,
    /// The rows to be written.
    pub rows: Arc<RowChanges>,
    /// What it took to follow.
    pub work: Work,
    /// Whether something in it cannot wait.
    pub urgent: bool,
    /// When the last event was folded.
    pub(crate) folded_at: Option<Instant>,
    pub(crate) shards: BTreeMap<ShardKey, BuiltShard>,
    /// What canaries have instead; none where they have nothing of their own any more.
    pub(crate) variants: BTreeMap<ShardKey, Option<BuiltShard>>,
    pub(crate) classes: BTreeMap<ClassId, Option<PublishedClass>>,
    pub(crate) sidecars: BTreeMap<InstanceId, Option<PublishedSidecar>>,
}

impl Delta {
    /// What a batch changed: `changes` as the projection reported them, `scopes` as its events named them.
    #[must_use]
    pub fn new<'a>(
        projection: &Projection,
        changes: &Changes,
        scopes: impl IntoIterator<Item = &'a Scope>,
    ) -> Self {
        let built = |key: &ShardKey| Some((key.clone(), projection.shards().get(key)?.clone()));
        let variant = |key: &ShardKey| (key.clone(), projection.variants().get(key).cloned());
        let class = |id: &ClassId| (*id, projection.classes().get(id).map(PublishedClass::from));
        let sidecar = |instance: &InstanceId| (instance.clone(), PublishedSidecar::of(projection, instance));
        Self {
            version: projection.version(),
            hash: None,
            rows: Arc::new(RowChanges::new(projection, changes, scopes)),
            work: changes.work,
            urgent: false,
            folded_at: None,
            shards: changes.shards.iter().filter_map(built).collect(),
            variants: changes.variants.iter().map(variant).collect(),
            classes: changes.manifests.union(&changes.classes).map(class).collect(),
            sidecars: changes.sidecars.iter().map(sidecar).collect(),
        }
    }

    /// All that sidecars may be told of a projection, without any row.
    #[must_use]
    pub fn everything(projection: &Projection) -> Self {
        let shard = |(key, shard): (&ShardKey, &BuiltShard)| (key.clone(), shard.clone());
        let variant = |(key, shard): (&ShardKey, &BuiltShard)| (key.clone(), Some(shard.clone()));
        let class = |(id, class): (&ClassId, &Class)| (*id, Some(PublishedClass::from(class)));
        let sidecar = |instance: &InstanceId| (instance.clone(), PublishedSidecar::of(projection, instance));
        Self {
            version: projection.version(),
            hash: None,
            rows: Arc::default(),
            work: Work::default(),
            urgent: true,
            folded_at: None,
            shards: projection.shards().iter().map(shard).collect(),
            variants: projection.variants().iter().map(variant).collect(),
            classes: projection.classes().iter().map(class).collect(),
            sidecars: projection.sidecars().map(sidecar).collect(),
        }
    }

    /// Takes in the delta that follows.
    pub fn merge(&mut self, next: Self) {
        self.version = next.version;
        self.hash = next.hash;
        Arc::make_mut(&mut self.rows).merge(Arc::unwrap_or_clone(next.rows));
        self.work += next.work;
        self.urgent |= next.urgent;
        self.folded_at = next.folded_at;
        self.shards.extend(next.shards);
        self.variants.extend(next.variants);
        self.classes.extend(next.classes);
        self.sidecars.extend(next.sidecars);
    }
}

/// A manifest as it is handed out.
#[derive(Clone, Debug)]
pub struct PublishedClass {
    /// The manifest.
    pub manifest: Manifest,
    /// The last event that touched anything in it.
    pub position: Position,
    /// The event that began the rollout that its members are canaries of.
    pub rollout: Option<Position>,
    /// Former manifests, the newest last. They share what did not change.
    former: VecDeque<Manifest>,
    /// Those that were asked for, by the manifest that they begin with.
    patches: Arc<Mutex<BTreeMap<Hash, Option<Arc<Patch>>>>>,
}

/// How to get from a former manifest of a class to its newest one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The hash of the former manifest.
    pub base: Hash,
    /// The shards that changed.
    pub shards: Vec<ShardPatch>,
}

/// How one shard changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPatch {
    /// Its place in the former manifest, and in the newest.
    pub place: usize,
    /// The last event that touched it.
    pub position: Position,
    /// How its bytes changed; none if only its position did.
    pub change: Option<ShardChange>,
}

/// How a shard's bytes changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardChange {
    /// In one short run.
    Splice(Arc<Splice>),
    /// The new bytes, zstd-compressed with the former ones as a dictionary.
    Delta {
        /// The compressed bytes.
        zstd: Bytes,
        /// Length of the new ones.
        length: usize,
    },
}

impl ShardChange {
    /// None for want of memory only.
    fn between(old: &[u8], new: &[u8]) -> Option<Self> {
        let splice = Splice::between(old, new);
        if splice.put.len() <= SPLICE_BYTES_MAX {
            return Some(Self::Splice(Arc::new(splice)));
        }
        let mut compressor = zstd::bulk::Compressor::with_dictionary(ZSTD_LEVEL, old).ok()?;
        let zstd = Bytes::from(compressor.compress(new).ok()?);
        Some(Self::Delta { zstd, length: new.len() })
    }

    fn len(&self) -> usize {
        match self {
            Self::Splice(splice) => splice.put.len(),
            Self::Delta { zstd, .. } => zstd.len(),
        }
    }
}

impl From<&Class> for PublishedClass {
    fn from(class: &Class) -> Self {
        Self {
            manifest: class.manifest.clone(),
            position: class.position,
            rollout: class.rollout,
            former: VecDeque::new(),
            patches: Arc::default(),
        }
    }
}

impl PublishedClass {
    /// The manifest with this hash, if it is the newest or one that is still remembered.
    #[must_use]
    pub fn manifest_with(&self, hash: Hash) -> Option<&Manifest> {
        [&self.manifest].into_iter().chain(self.former.iter().rev()).find(|manifest| manifest.hash() == hash)
    }

    /// How many former manifests are remembered.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.former.len()
    }

    fn succeed(&mut self, before: Self) {
        self.former = before.former;
        if before.manifest.hash() != self.manifest.hash() {
            self.former.push_back(before.manifest);
        }
        while self.former.len() > MANIFESTS_REMEMBERED {
            self.former.pop_front();
        }
    }
}

/// Which class a sidecar is in, and since which event.
#[derive(Clone, Debug)]
pub(crate) struct PublishedSidecar {
    class: ClassId,
    since: Position,
}

impl PublishedSidecar {
    fn of(projection: &Projection, instance: &InstanceId) -> Option<Self> {
        let wanted = projection.wanted(instance)?;
        Some(Self { class: wanted.id, since: wanted.since })
    }
}

/// A shard and its compressed bytes, which are made when first asked for and then shared by everybody.
#[derive(Clone, Debug)]
pub struct PublishedShard {
    /// The shard.
    pub built: BuiltShard,
    compressed: Arc<OnceLock<Bytes>>,
    /// What it was before, the newest last.
    former: VecDeque<Former>,
}

#[derive(Clone, Debug)]
struct Former {
    hash: Hash,
    bytes: Arc<[u8]>,
    /// From it to the newest bytes.
    change: Arc<OnceLock<ShardChange>>,
}

impl PublishedShard {
    fn new(built: BuiltShard) -> Self {
        Self { built, compressed: Arc::default(), former: VecDeque::new() }
    }

    /// The canonical bytes, zstd-compressed.
    ///
    /// # Errors
    /// If the compressor fails, which it does for want of memory only.
    pub fn compressed(&self) -> io::Result<Bytes> {
        if let Some(bytes) = self.compressed.get() {
            return Ok(bytes.clone());
        }
        let bytes = Bytes::from(zstd::bulk::compress(&self.built.bytes, ZSTD_LEVEL)?);
        Ok(self.compressed.get_or_init(|| bytes).clone())
    }

    /// How the bytes changed since those of this former hash; none if they are not remembered.
    fn change_from(&self, hash: Hash) -> Option<ShardChange> {
        let former = self.former.iter().rev().find(|former| former.hash == hash)?;
        if let Some(change) = former.change.get() {
            return Some(change.clone());
        }
        // Without memory there is no patch, and whoever asked pulls.
        let change = ShardChange::between(&former.bytes, &self.built.bytes)?;
        Some(former.change.get_or_init(|| change).clone())
    }

    /// Takes the place of an earlier one with other content.
    fn succeed(&mut self, before: Self) {
        let remembered = before.former.into_iter().map(|former| Former { change: Arc::default(), ..former });
        self.former = remembered.collect();
        let BuiltShard { hash, bytes, .. } = before.built;
        self.former.push_back(Former { hash, bytes, change: Arc::default() });
        let mut bytes: usize = self.former.iter().map(|former| former.bytes.len()).sum();
        while self.former.len() > FORMER_MAX || bytes > FORMER_BYTES_MAX {
            let Some(oldest) = self.former.pop_front() else { break };
            bytes -= oldest.bytes.len();
        }
    }
}

/// What one sidecar is to run.
#[derive(Clone, Debug)]
pub struct WantedSnapshot<'a> {
    /// The snapshot's version.
    pub version: ConfigVersion,
    /// The manifest of its class.
    pub class: &'a PublishedClass,
}

impl WantedSnapshot<'_> {
    /// What names it.
    #[must_use]
    pub fn named(&self) -> (ConfigVersion, Hash) {
        (self.version, self.class.manifest.hash())
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Published {
    version: ConfigVersion,
    hash: Option<EventHash>,
    shards: BTreeMap<ShardKey, PublishedShard>,
    /// What canaries have instead.
    variants: BTreeMap<ShardKey, PublishedShard>,
    classes: BTreeMap<ClassId, PublishedClass>,
    sidecars: BTreeMap<InstanceId, PublishedSidecar>,
    feeds: BTreeMap<ClassId, watch::Sender<ConfigVersion>>,
    /// How many sidecars are in each class.
    members: BTreeMap<ClassId, usize>,
    announcements: Announcements,
}

impl Published {
    /// The last event that is part of it.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        self.version
    }

    /// That event as a point of the log; none before the first one.
    #[must_use]
    pub fn point(&self) -> Option<Point> {
        let ConfigVersion { epoch, position } = self.version;
        self.hash.map(|hash| Point { epoch, position, hash })
    }

    /// The shard of some manifest in force, everybody's or canaries', as the manifest lists it.
    #[must_use]
    pub fn shard(&self, key: &ShardKey, hash: Hash) -> Option<&PublishedShard> {
        let both = [self.shards.get(key), self.variants.get(key)];
        both.into_iter().flatten().find(|shard| shard.built.hash == hash)
    }

    /// What a sidecar is to run; none if it does not take part.
    #[must_use]
    pub fn wanted(&self, instance: &InstanceId) -> Option<WantedSnapshot<'_>> {
        let PublishedSidecar { class, since } = self.sidecars.get(instance)?;
        let class = self.classes.get(class)?;
        let version = ConfigVersion::new(self.version.epoch, class.position.max(*since));
        Some(WantedSnapshot { version, class })
    }

    /// Tells when something changes for a sidecar, if it takes part: the version of that publication. Ends when its class has
    /// no members any more.
    #[must_use]
    pub fn feed(&self, instance: &InstanceId) -> Option<watch::Receiver<ConfigVersion>> {
        Some(self.feeds.get(&self.sidecars.get(instance)?.class)?.subscribe())
    }

    /// A sidecar's class, and the event that put it there; none if it does not take part.
    #[must_use]
    pub fn class_of(&self, instance: &InstanceId) -> Option<(ClassId, Position)> {
        let PublishedSidecar { class, since } = self.sidecars.get(instance)?;
        Some((*class, *since))
    }

    /// What was announced after the first `seen` announcements, and how many there are now.
    #[must_use]
    pub fn announced(&self, seen: u64) -> (u64, Vec<Announced>) {
        self.announcements.after(seen)
    }

    /// How to get to a class's newest manifest from an earlier one. None if that is not remembered, or takes much.
    #[must_use]
    pub fn patch(&self, class: &PublishedClass, base: Hash) -> Option<Arc<Patch>> {
        // Looked for first: what is remembered here is bounded by it, whatever callers claim to have.
        let former = class.manifest_with(base)?;
        let mut patches = class.patches.lock().unwrap_or_else(PoisonError::into_inner);
        patches.entry(base).or_insert_with(|| self.make_patch(class, base, former).map(Arc::new)).clone()
    }

    fn make_patch(&self, class: &PublishedClass, base: Hash, former: &Manifest) -> Option<Patch> {
        let difference = class.manifest.since(former);
        if !difference.removed.is_empty() {
            return None;
        }
        let mut shards = Vec::new();
        let mut bytes = 0;
        for Changed { key, entry, before } in difference.changed {
            let before = before?;
            let shard = self.shard(key, entry.hash)?;
            let change = if entry.hash == before.hash { None } else { Some(shard.change_from(before.hash)?) };
            bytes += change.as_ref().map_or(0, ShardChange::len);
            if bytes > PATCH_BYTES_MAX {
                return None;
            }
            // Both manifests list the same keys, so the place is the same in both.
            let place = class.manifest.place(key)?;
            shards.push(ShardPatch { place, position: entry.position, change });
        }
        Some(Patch { base, shards })
    }

    /// Makes what a batch changed part of what sidecars may be told, from `now` on. The caller has committed it. Says how many
    /// subscribers were woken.
    pub fn take_in(&mut self, delta: Delta, now: Instant) -> usize {
        let folded_at = delta.folded_at.unwrap_or(now);
        let new_epoch = self.version.epoch != delta.version.epoch;
        self.version = delta.version;
        self.hash = delta.hash;
        for (key, built) in delta.shards {
            put(&mut self.shards, key, built);
        }
        for (key, built) in delta.variants {
            match built {
                Some(built) => put(&mut self.variants, key, built),
                None => {
                    self.variants.remove(&key);
                }
            }
        }
        let mut concerned: BTreeSet<ClassId> = delta.classes.keys().copied().collect();
        let mut news = Vec::new();
        for (id, class) in delta.classes {
            let before = self.classes.remove(&id);
            if let Some(mut class) = class {
                if let Some(before) = before {
                    // Whoever joins a class has it from then on; those who were in it before learn something new.
                    if class.position != before.position {
                        let version = ConfigVersion::new(self.version.epoch, class.position);
                        news.push((version, id, self.members.get(&id).copied().unwrap_or_default()));
                    }
                    class.succeed(before);
                }
                self.classes.insert(id, class);
            }
        }
        for (instance, sidecar) in delta.sidecars {
            let before = match sidecar {
                Some(sidecar) => {
                    *self.members.entry(sidecar.class).or_default() += 1;
                    self.sidecars.insert(instance, sidecar)
                }
                None => self.sidecars.remove(&instance),
            };
            if let Some(PublishedSidecar { class, .. }) = &before
                && let Some(members) = self.members.get_mut(class)
            {
                *members -= 1;
                if *members == 0 {
                    self.members.remove(class);
                }
            }
            // Who follows the class that it was in is to follow another one.
            concerned.extend(before.map(|before| before.class));
        }
        self.announcements.push(news, folded_at, now);
        self.tell(concerned, new_epoch)
    }

    /// Wakes the subscribers of these classes; a new epoch is a new version for everybody.
    fn tell(&mut self, concerned: BTreeSet<ClassId>, new_epoch: bool) -> usize {
        let mut told = 0;
        let mut tell = |feed: &watch::Sender<ConfigVersion>, version| {
            feed.send_replace(version);
            told += feed.receiver_count();
        };
        for id in concerned {
            if self.classes.contains_key(&id) {
                let feed = self.feeds.entry(id).or_default();
                if !new_epoch {
                    tell(feed, self.version);
                }
            } else {
                self.feeds.remove(&id);
            }
        }
        if new_epoch {
            self.feeds.values().for_each(|feed| tell(feed, self.version));
        }
        told
    }
}

/// Puts a shard into the place of what it was before.
fn put(shards: &mut BTreeMap<ShardKey, PublishedShard>, key: ShardKey, built: BuiltShard) {
    match shards.entry(key) {
        // Only its position moved: the compressed bytes stay good.
        Entry::Occupied(mut shard) if shard.get().built.hash == built.hash => shard.get_mut().built = built,
        Entry::Occupied(mut shard) => {
            let before = shard.insert(PublishedShard::new(built));
            shard.get_mut().succeed(before);
        }
        Entry::Vacant(place) => {
            place.insert(PublishedShard::new(built));
        }
    }
}

#[cfg(test)]
mod tests;
