//! Bytes to a checkpoint. They may come from anywhere: every record is checked as it is read, and the first that is not
//! right ends it.

use super::wire::{Header, Record};
use super::{Checkpoint, CheckpointError, FOLD_VERSION};
use crate::damping::Damping;
use crate::shard::ShardKey;
use crate::state::{EffectiveHealth, Entry, RoutingState};
use prost::Message;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use weft_model::health::Health;
use weft_model::membership::MembershipState;
use weft_model::{ConfigVersion, Epoch, InstanceId, Position, Scope, ScopeVersion, Timestamp, Version};

pub(super) fn decode(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let mut rest = bytes;
    let header = Header::decode_length_delimited(&mut rest)
        .map_err(|source| CheckpointError::Encoding { record: 0, source })?;
    if header.fold_version != FOLD_VERSION {
        return Err(CheckpointError::Version { found: header.fold_version });
    }
    let mut reading = Reading::new(&header);
    while !rest.is_empty() {
        reading.record += 1;
        let record = Record::decode_length_delimited(&mut rest)
            .map_err(|source| CheckpointError::Encoding { record: reading.record, source })?;
        reading.take(record)?;
    }
    if reading.record != header.records {
        return Err(CheckpointError::Field { record: 0, field: "number of records" });
    }
    Ok(reading.checkpoint)
}

/// What was read so far.
struct Reading {
    checkpoint: Checkpoint,
    /// The number of the record that is being read.
    record: u64,
    last: Option<Scope>,
}

impl Reading {
    fn new(header: &Header) -> Self {
        let state = RoutingState {
            version: ConfigVersion::new(Epoch(header.epoch), Position(header.position)),
            at: Timestamp(header.at_ms),
            mesh_security: scope_version(header.mesh_security_version, header.mesh_security_position),
            ..RoutingState::default()
        };
        let mut shards = BTreeMap::new();
        if header.trust_position > 0 {
            shards.insert(ShardKey::Trust, Position(header.trust_position));
        }
        Self { checkpoint: Checkpoint { state, shards, since: BTreeMap::new() }, record: 0, last: None }
    }

    fn take(&mut self, mut record: Record) -> Result<(), CheckpointError> {
        let scope: Scope = record.scope.parse().map_err(|_| self.malformed("scope"))?;
        if self.last.as_ref().is_some_and(|last| *last >= scope) {
            return Err(self.malformed("order"));
        }
        let end = self.checkpoint.state.version.position.0;
        if record.version == 0 || record.position == 0 || record.position > end {
            return Err(self.malformed("version"));
        }
        match &scope {
            Scope::Service(service) => {
                let entry = self.entry(&mut record)?;
                self.checkpoint.state.services.insert(service.clone(), entry);
                let address = Ipv4Addr::from(record.address);
                if record.address != 0 && !self.checkpoint.state.addresses.restore(service, address) {
                    return Err(self.malformed("address"));
                }
                let shards = &mut self.checkpoint.shards;
                shards.insert(ShardKey::Endpoints(service.clone()), Position(record.endpoints_position));
                shards.insert(ShardKey::Inbound(service.clone()), Position(record.inbound_position));
            }
            Scope::Membership(id) => self.take_membership(id, &mut record)?,
            Scope::Health(id) => {
                let entry = self.entry(&mut record)?;
                let source = scope_version(record.seen_version, record.seen_position);
                let health = health(record.seen).ok_or_else(|| self.malformed("health"))?;
                let instance = self.checkpoint.state.instances.make(id);
                instance.health = entry;
                instance.seen = EffectiveHealth { health, source };
            }
            Scope::Traffic(scope) => {
                let entry = self.entry(&mut record)?;
                self.checkpoint.state.traffic.insert(scope.clone(), entry);
            }
            Scope::Security(scope) => {
                let entry = self.entry(&mut record)?;
                self.checkpoint.state.security.insert(scope.clone(), entry);
            }
            Scope::Identity(id) => {
                let entry = self.entry(&mut record)?;
                self.checkpoint.state.instances.make(id).identity = entry;
            }
            Scope::Token(id) => {
                let entry = self.entry(&mut record)?;
                self.checkpoint.state.tokens.insert(id.clone(), Arc::new(entry));
            }
            Scope::Ca => self.checkpoint.state.ca = self.entry(&mut record)?,
            Scope::Mesh => self.checkpoint.state.mesh = self.entry(&mut record)?,
            Scope::Rollout => self.checkpoint.state.rollout = self.entry(&mut record)?,
        }
        self.last = Some(scope);
        Ok(())
    }

    fn take_membership(&mut self, id: &InstanceId, record: &mut Record) -> Result<(), CheckpointError> {
        let membership = self.entry::<MembershipState>(record)?;
        let damping: Option<Box<Damping>> = match record.damping.as_str() {
            "" => None,
            text => Some(serde_json::from_str(text).map_err(|source| self.unfit(source))?),
        };
        if damping.is_some() && membership.state.registration().is_none() {
            return Err(self.malformed("damping"));
        }
        let state = &mut self.checkpoint.state;
        let takes_part = membership.state.registration().is_some();
        if takes_part {
            self.checkpoint.since.insert(id.clone(), Position(record.since));
        }
        if damping.as_ref().is_some_and(|damping| damping.held.is_some()) {
            state.held.insert(id.clone());
        }
        let instance = state.instances.make(id);
        instance.placed = match record.placed {
            0 => membership.source.position,
            placed => Position(placed),
        };
        (instance.membership, instance.damping) = (membership, damping);
        if takes_part {
            state.enter(id);
        }
        Ok(())
    }

    fn entry<S: DeserializeOwned>(&self, record: &mut Record) -> Result<Entry<S>, CheckpointError> {
        let state = serde_json::from_str(&record.state).map_err(|source| self.unfit(source))?;
        Ok(Entry {
            state,
            source: scope_version(record.version, record.position),
            at: Timestamp(record.at_ms),
            actor: std::mem::take(&mut record.actor),
        })
    }

    const fn unfit(&self, source: serde_json::Error) -> CheckpointError {
        CheckpointError::State { record: self.record, source }
    }

    const fn malformed(&self, field: &'static str) -> CheckpointError {
        CheckpointError::Field { record: self.record, field }
    }
}

const fn scope_version(version: u64, position: u64) -> ScopeVersion {
    ScopeVersion { version: Version(version), position: Position(position) }
}

const fn health(number: u32) -> Option<Health> {
    match number {
        0 => Some(Health::Unknown),
        1 => Some(Health::Healthy),
        2 => Some(Health::Unhealthy),
        _ => None,
    }
}
