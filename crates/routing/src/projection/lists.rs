//! Lists of upstreams: what the classes with the same upstreams share of their manifests, made once for all of them; those of
//! canaries apart.

use super::Built;
use crate::interest::{ClassId, InterestClass, ListId};
use crate::manifest::{ManifestEntry, Pages};
use crate::shard::ShardKey;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use weft_model::ServiceName;
use weft_model::membership::Upstreams;

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lists {
    all: BTreeMap<ListId, List>,
    /// Which lists name a service.
    naming: BTreeMap<ServiceName, BTreeSet<ListId>>,
    /// Those that name every service: everybody's and canaries', if they are there.
    wildcards: BTreeSet<ListId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct List {
    upstreams: Upstreams,
    canary: bool,
    pages: Pages,
    /// Who shares it.
    classes: BTreeSet<ClassId>,
}

/// Which entries of a list are not as they were.
#[derive(Debug)]
pub(super) enum Touched {
    /// These.
    Keys(BTreeSet<ShardKey>),
    /// The list is new.
    Everything,
}

impl Lists {
    /// A class has these upstreams. True if none had before.
    pub(super) fn join(&mut self, id: ListId, interest: &InterestClass, class: ClassId) -> bool {
        let InterestClass { upstreams, canary, .. } = interest;
        let list = match self.all.entry(id) {
            Entry::Occupied(list) => {
                list.into_mut().classes.insert(class);
                return false;
            }
            Entry::Vacant(place) => place.insert(List {
                upstreams: upstreams.clone(),
                canary: *canary,
                pages: Pages::new(&[]),
                classes: BTreeSet::new(),
            }),
        };
        list.classes.insert(class);
        match upstreams {
            Upstreams::All => {
                self.wildcards.insert(id);
            }
            Upstreams::Only(services) => {
                for service in services {
                    self.naming.entry(service.clone()).or_default().insert(id);
                }
            }
        }
        true
    }

    /// A class is no more.
    pub(super) fn leave(&mut self, id: ListId, interest: &InterestClass, class: ClassId) {
        let Entry::Occupied(mut list) = self.all.entry(id) else { return };
        list.get_mut().classes.remove(&class);
        if !list.get().classes.is_empty() {
            return;
        }
        list.remove();
        match &interest.upstreams {
            Upstreams::All => {
                self.wildcards.remove(&id);
            }
            Upstreams::Only(services) => {
                for service in services {
                    if let Entry::Occupied(mut lists) = self.naming.entry(service.clone()) {
                        lists.get_mut().remove(&id);
                        if lists.get().is_empty() {
                            lists.remove();
                        }
                    }
                }
            }
        }
    }

    /// The lists that a service is in.
    pub(super) fn naming(&self, service: &ServiceName) -> impl Iterator<Item = ListId> {
        self.naming.get(service).into_iter().flatten().chain(&self.wildcards).copied()
    }

    /// Whether canaries have the list.
    pub(super) fn is_canary(&self, id: ListId) -> bool {
        self.all.get(&id).is_some_and(|list| list.canary)
    }

    pub(super) fn classes(&self, id: ListId) -> impl Iterator<Item = ClassId> {
        self.all.get(&id).into_iter().flat_map(|list| &list.classes).copied()
    }

    /// The list's pages; none if nobody has it.
    pub(super) fn pages(&self, id: ListId) -> Pages {
        self.all.get(&id).map_or_else(|| Pages::new(&[]), |list| list.pages.clone())
    }

    /// Makes a list's pages from the shards as they are: those with a key that was touched, or all if a service is new in
    /// it. False if nobody has the list.
    pub(super) fn rebuild(&mut self, id: ListId, touched: &Touched, built: &Built<'_>) -> bool {
        let Some(list) = self.all.get_mut(&id) else { return false };
        match touched {
            Touched::Keys(keys) if keys.iter().all(|key| list.pages.contains(key)) => {
                let entry = |key| (key, built.listed(key, list.canary));
                list.pages = list.pages.with(keys.iter().map(entry));
            }
            Touched::Keys(_) | Touched::Everything => list.pages = Pages::new(&list.entries(built)),
        }
        true
    }
}

impl List {
    fn entries(&self, built: &Built<'_>) -> Vec<(ShardKey, ManifestEntry)> {
        let named = |key: ShardKey| {
            let entry = built.listed(&key, self.canary)?;
            Some((key, entry))
        };
        match &self.upstreams {
            Upstreams::All => {
                // Shards sort by kind, so those of endpoints come first.
                let all = built.shards.keys().take_while(|key| matches!(key, ShardKey::Endpoints(_)));
                all.cloned().filter_map(named).collect()
            }
            Upstreams::Only(services) => {
                services.iter().cloned().map(ShardKey::Endpoints).filter_map(named).collect()
            }
        }
    }
}
