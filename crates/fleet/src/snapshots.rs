//! Snapshots that somebody of the fleet has decoded: the others of its service, who are sent the same bytes, share them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use weft_client::take::{self, Refusal};
use weft_model::{ConfigVersion, InstanceId, ServiceName, TrustDomain};
use weft_proto::v1;
use weft_routing::{HashStart, Snapshot};

/// Snapshots that are remembered: the last ones of some hundred services.
const REMEMBERED: usize = 4_096;

/// What a service's sidecars are to run. A manifest's hash covers all content.
type Key = (ServiceName, ConfigVersion, HashStart);

#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    snapshots: BTreeMap<Key, Arc<Snapshot>>,
    oldest_first: VecDeque<Key>,
}

impl Snapshots {
    /// Takes what a pull brought, as a sidecar does.
    pub(crate) fn take(
        &self,
        pulled: &v1::PullResponse,
        current: Option<&Snapshot>,
        own: &InstanceId,
        trust_domain: &TrustDomain,
    ) -> Result<Option<Arc<Snapshot>>, Refusal> {
        let make = || take::take(pulled, current, own, trust_domain);
        self.get_or_make(pulled.header.as_ref(), own, current, make)
    }

    /// Takes the patch of a notice, as a sidecar does. None if it is not for what the sidecar has.
    pub(crate) fn take_patch(
        &self,
        notice: &v1::Notice,
        current: &Snapshot,
        own: &InstanceId,
        trust_domain: &TrustDomain,
    ) -> Result<Option<Arc<Snapshot>>, Refusal> {
        let base = notice.patch.as_ref().map(|patch| patch.base);
        if base != Some(current.manifest_hash.prefix()) {
            return Ok(None);
        }
        let make = || take::take_patch(notice, current, own, trust_domain);
        self.get_or_make(notice.wanted.as_ref(), own, Some(current), make)
    }

    fn get_or_make(
        &self,
        header: Option<&v1::SnapshotHeader>,
        own: &InstanceId,
        current: Option<&Snapshot>,
        make: impl FnOnce() -> Result<Option<Snapshot>, Refusal>,
    ) -> Result<Option<Arc<Snapshot>>, Refusal> {
        let Some(key) = header.and_then(|header| key(header, own)) else {
            return Ok(make()?.map(Arc::new));
        };
        if current.is_none_or(|current| current.version < key.1)
            && let Some(known) = self.lock().snapshots.get(&key)
        {
            return Ok(Some(Arc::clone(known)));
        }
        let Some(made) = make()?.map(Arc::new) else { return Ok(None) };
        self.lock().remember(key, &made);
        Ok(Some(made))
    }

    /// Bytes of the largest snapshot.
    pub(crate) fn largest(&self) -> u64 {
        let bytes = |snapshot: &Snapshot| {
            let shards =
                snapshot.manifest.entries().map(|(key, _)| key).filter_map(|key| snapshot.shard(key));
            shards.map(|shard| shard.len()).sum::<usize>() + snapshot.manifest_bytes().len()
        };
        let largest = self.lock().snapshots.values().map(|snapshot| bytes(snapshot)).max();
        u64::try_from(largest.unwrap_or_default()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn remember(&mut self, key: Key, snapshot: &Arc<Snapshot>) {
        if self.snapshots.insert(key.clone(), Arc::clone(snapshot)).is_none() {
            self.oldest_first.push_back(key);
        }
        while self.oldest_first.len() > REMEMBERED {
            if let Some(oldest) = self.oldest_first.pop_front() {
                self.snapshots.remove(&oldest);
            }
        }
    }
}

fn key(header: &v1::SnapshotHeader, own: &InstanceId) -> Option<Key> {
    let version = take::version(header.version.as_ref()?);
    Some((own.service.clone(), version, HashStart::from_slice(&header.manifest_hash)?))
}
