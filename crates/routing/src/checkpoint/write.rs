//! A checkpoint to bytes.

use super::wire::{Header, Record};
use super::{Checkpoint, FOLD_VERSION};
use crate::shard::ShardKey;
use crate::state::Entry;
use prost::Message;
use serde::Serialize;
use weft_model::health::Health;
use weft_model::{Position, Scope};

pub(super) fn encode(checkpoint: &Checkpoint) -> Vec<u8> {
    let state = &checkpoint.state;
    let position = |key| checkpoint.shards.get(&key).copied().unwrap_or_default();
    let mut records = Records::default();
    for (service, entry) in &state.services {
        records.push(&Scope::Service(service.clone()), entry, |record| {
            record.address = state.address(service).map_or(0, u32::from);
            record.endpoints_position = position(ShardKey::Endpoints(service.clone())).0;
            record.inbound_position = position(ShardKey::Inbound(service.clone())).0;
        });
    }
    for (id, instance) in state.instances.iter() {
        records.push(&Scope::Membership(id.clone()), &instance.membership, |record| {
            record.since = checkpoint.since.get(id).map_or(0, |since| since.0);
            let placed =
                Some(instance.placed).filter(|placed| *placed != instance.membership.source.position);
            record.placed = placed.map_or(0, |placed| placed.0);
            record.damping = instance.damping.as_ref().map(json).unwrap_or_default();
        });
    }
    for (id, instance) in state.instances.iter() {
        records.push(&Scope::Health(id.clone()), &instance.health, |record| {
            record.seen = health(instance.seen.health);
            record.seen_version = instance.seen.source.version.0;
            record.seen_position = instance.seen.source.position.0;
        });
    }
    for (scope, entry) in &state.traffic {
        records.push(&Scope::Traffic(scope.clone()), entry, |_| ());
    }
    for (scope, entry) in &state.security {
        records.push(&Scope::Security(scope.clone()), entry, |_| ());
    }
    for (id, instance) in state.instances.iter() {
        records.push(&Scope::Identity(id.clone()), &instance.identity, |_| ());
    }
    for (id, entry) in &state.tokens {
        records.push(&Scope::Token(id.clone()), entry.as_ref(), |_| ());
    }
    records.push(&Scope::Ca, &state.ca, |_| ());
    records.push(&Scope::Mesh, &state.mesh, |_| ());
    records.push(&Scope::Rollout, &state.rollout, |_| ());
    let header = Header {
        fold_version: FOLD_VERSION,
        epoch: state.version.epoch.0,
        position: state.version.position.0,
        at_ms: state.at.0,
        mesh_security_version: state.mesh_security.version.0,
        mesh_security_position: state.mesh_security.position.0,
        trust_position: position(ShardKey::Trust).0,
        records: records.count,
    };
    let mut bytes = header.encode_length_delimited_to_vec();
    bytes.append(&mut records.bytes);
    bytes
}

pub(super) const fn health(health: Health) -> u32 {
    match health {
        Health::Unknown => 0,
        Health::Healthy => 1,
        Health::Unhealthy => 2,
    }
}

/// No state has a key that is not text or a number that is not finite, so this does not fail; if it did, the checkpoint would
/// be refused when it is read, and the log folded instead.
fn json(state: &impl Serialize) -> String {
    serde_json::to_string(state).unwrap_or_default()
}

#[derive(Default)]
struct Records {
    count: u64,
    bytes: Vec<u8>,
}

impl Records {
    /// Adds a scope, if it has an event.
    fn push<S: Serialize>(&mut self, scope: &Scope, entry: &Entry<S>, more: impl FnOnce(&mut Record)) {
        if entry.source.position == Position::ZERO {
            return;
        }
        let mut record = Record {
            scope: scope.to_string(),
            version: entry.source.version.0,
            position: entry.source.position.0,
            at_ms: entry.at.0,
            actor: entry.actor.clone(),
            state: json(&entry.state),
            ..Record::default()
        };
        more(&mut record);
        self.count += 1;
        self.bytes.reserve(record.encoded_len() + 10);
        // A vector has room for everything.
        let _ = record.encode_length_delimited(&mut self.bytes);
    }
}
