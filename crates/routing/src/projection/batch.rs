//! What a batch of events touched, and a batch of many pages.

use super::lists::Touched;
use super::{Changes, Projection};
use crate::interest::{ClassId, ListId};
use crate::shard::ShardKey;
use crate::state::{FoldError, TouchedShards};
use foldhash::fast::FixedState;
use std::collections::{BTreeMap, BTreeSet};
use weft_model::{ConfigVersion, Fact, Position, ServiceName};

/// The last event of a batch that touched each shard, and what else it changed.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) endpoints: Positions,
    pub(super) inbound: Positions,
    pub(super) trust: Option<Position>,
    /// Shards of which canaries get variants, or lose them.
    pub(super) variants: BTreeSet<ShardKey>,
    /// Lists of upstreams that nobody had before.
    pub(super) new_lists: BTreeMap<ListId, Touched>,
    pub(super) changes: Changes,
}

/// What is to be made anew after a batch's shards were.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    pub(super) lists: BTreeMap<ListId, Touched>,
    /// Classes whose own shards changed.
    pub(super) own: BTreeSet<ClassId>,
}

impl Dirty {
    pub(super) fn touch(&mut self, list: ListId, key: &ShardKey) {
        match self.lists.entry(list).or_insert_with(|| Touched::Keys(BTreeSet::new())) {
            Touched::Keys(keys) => {
                keys.insert(key.clone());
            }
            Touched::Everything => {}
        }
    }
}

#[expect(clippy::disallowed_types, reason = "what is built from it is put into ordered maps")]
pub(super) type Positions = std::collections::HashMap<ServiceName, Position, FixedState>;

impl Batch {
    pub(super) fn touch(&mut self, shards: &TouchedShards<'_>, position: Position) {
        fn put(positions: &mut Positions, service: &ServiceName, position: Position) {
            match positions.get_mut(service) {
                Some(last) => *last = position,
                None => {
                    positions.insert(service.clone(), position);
                }
            }
        }
        match shards {
            TouchedShards::None => {}
            TouchedShards::Endpoints(service) => put(&mut self.endpoints, service, position),
            TouchedShards::Service(service) => {
                put(&mut self.endpoints, service, position);
                put(&mut self.inbound, service, position);
            }
            TouchedShards::Inbound(services) => {
                services.iter().for_each(|service| put(&mut self.inbound, service, position));
            }
            TouchedShards::Trust => self.trust = Some(position),
        }
    }
}

/// A projection that takes in many events before shards and manifests are built, once, at the end. Nobody sees it in
/// between, when its state is ahead of them. Because a shard's position is that of the last event that touched it, it
/// ends up the same as if it had been built after every event.
#[derive(Debug)]
pub struct Bulk {
    projection: Projection,
    batch: Batch,
}

impl Bulk {
    pub(super) fn new(projection: Projection) -> Self {
        Self { projection, batch: Batch::default() }
    }

    /// The last event that was folded.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        self.projection.version()
    }

    /// Takes in the next events.
    ///
    /// # Errors
    /// If an event is not the next one. Those before it were taken in; this is not to be used further.
    pub fn apply<'a>(&mut self, facts: impl IntoIterator<Item = &'a Fact>) -> Result<(), FoldError> {
        self.projection.fold(&mut self.batch, facts)
    }

    /// The projection after all of them.
    #[must_use]
    pub fn finish(mut self) -> Projection {
        self.projection.build(self.batch);
        self.projection
    }
}
