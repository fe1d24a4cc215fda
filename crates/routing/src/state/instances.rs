//! The instances of the mesh: what the three scopes of one instance say, side by side, so that an event finds all that
//! it needs with one look-up.
//!
//! Found by hash and listed by name. An instance that was once seen stays, so a place in the list is for good; which
//! place it is depends on the order in which instances came, and is not part of what two of these are compared by.
//!
//! A clone shares what it can, and the fold copies what it changes while the clone lives: a checkpoint is encoded from one,
//! beside the fold.

use super::{EffectiveHealth, Entry};
use crate::damping::Damping;
use foldhash::fast::FixedState;
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::health::{Health, HealthState};
use weft_model::identity::IdentityState;
use weft_model::membership::MembershipState;
use weft_model::{InstanceId, Position, Timestamp};

/// Where each instance is.
///
/// The hasher has a fixed key, as pure code draws no randomness. Whoever may choose many names could choose ones that
/// collide, and make the fold slow; but whoever may register a hundred thousand instances can do that anyway.
#[expect(clippy::disallowed_types, reason = "only ever looked up; its order reaches nothing")]
type Places = std::collections::HashMap<InstanceId, usize, FixedState>;

/// What is known of one instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) membership: Entry<MembershipState>,
    pub(crate) health: Entry<HealthState>,
    pub(crate) identity: Entry<IdentityState>,
    pub(crate) seen: EffectiveHealth,
    /// The last event that said how it is reached. What is said of its upstreams is not told to those who connect to it.
    pub(crate) placed: Position,
    /// None until it gets points; most instances never do.
    pub(crate) damping: Option<Box<Damping>>,
}

impl Instance {
    /// What is reported of its health since it takes part; what is seen differs while it is held.
    pub(crate) fn reported(&self) -> Health {
        self.damping.as_ref().map_or(self.seen.health, |damping| damping.reported)
    }

    pub(crate) fn is_held(&self) -> bool {
        self.damping.as_ref().is_some_and(|damping| damping.held.is_some())
    }

    pub(crate) fn damping_mut(&mut self, now: Timestamp) -> &mut Damping {
        let reported = self.seen.health;
        self.damping.get_or_insert_with(|| Box::new(Damping::new(reported, now)))
    }

    pub(crate) fn forget_health(&mut self, now: Timestamp) {
        self.seen = EffectiveHealth::default();
        if let Some(damping) = &mut self.damping {
            damping.reported = Health::Unknown;
            damping.reported_since = now;
        }
    }
}

/// Where an instance is in the list, to find it again without a look-up. Where that is depends on the order in which instances
/// came, so it makes nothing differ.
#[derive(Clone, Copy, Debug, Eq)]
pub(crate) struct Place(usize);

impl PartialEq for Place {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Instances {
    all: Vec<Arc<Instance>>,
    places: Arc<Places>,
    names: Arc<BTreeMap<InstanceId, usize>>,
}

impl Instances {
    pub(crate) fn get(&self, id: &InstanceId) -> Option<&Instance> {
        self.places.get(id).and_then(|place| self.all.get(*place)).map(AsRef::as_ref)
    }

    pub(crate) fn place(&self, id: &InstanceId) -> Option<Place> {
        self.places.get(id).copied().map(Place)
    }

    pub(crate) fn at(&self, place: Place) -> Option<&Instance> {
        self.all.get(place.0).map(AsRef::as_ref)
    }

    pub(crate) fn get_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        self.places.get(id).and_then(|place| self.all.get_mut(*place)).map(Arc::make_mut)
    }

    /// The instance, which is there from now on.
    pub(crate) fn make(&mut self, id: &InstanceId) -> &mut Instance {
        let place = match self.places.get(id) {
            Some(place) => *place,
            None => {
                let place = self.all.len();
                self.all.push(Arc::default());
                Arc::make_mut(&mut self.places).insert(id.clone(), place);
                Arc::make_mut(&mut self.names).insert(id.clone(), place);
                place
            }
        };
        Arc::make_mut(&mut self.all[place])
    }

    /// Every instance, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&InstanceId, &Instance)> {
        self.names.iter().filter_map(|(id, place)| Some((id, self.all.get(*place)?.as_ref())))
    }
}

impl PartialEq for Instances {
    fn eq(&self, other: &Self) -> bool {
        self.names.len() == other.names.len() && self.iter().eq(other.iter())
    }
}

impl Eq for Instances {}
