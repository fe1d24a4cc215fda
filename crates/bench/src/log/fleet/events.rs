//! What happens in a lane, event by event, with texts and numbers as a mesh has them.

use std::net::{IpAddr, Ipv4Addr};

use rand::RngExt;
use weft_model::health::{Health, HealthEvent, HealthReported};
use weft_model::identity::{IdentityEvent, LeafIssued};
use weft_model::membership::{
    InstanceDeregistered, InstanceDraining, InstanceRegistered, MembershipEvent, Upstreams,
};
use weft_model::security::{Action, Mode, Rule, SecurityEvent, SecurityPolicy, SecurityPolicySet, Sources};
use weft_model::service::{ServiceDeclared, ServiceEvent, ServicePort};
use weft_model::traffic::{Balance, ConnectPolicy, TrafficEvent, TrafficPolicy, TrafficPolicySet};
use weft_model::{Event, Port, Timestamp};

use super::{Lane, service_name};

/// Some day in 2026, in milliseconds: leaves need times, and what is made must not depend on when.
pub(super) const EPOCH_MS: i64 = 1_780_000_000_000;

/// That a service is there.
pub(super) fn declaration() -> anyhow::Result<Event> {
    let ports = vec![ServicePort { name: "app".parse()?, port: port(8_080)? }];
    Ok(ServiceEvent::from(ServiceDeclared { ports, address: None }).into())
}

pub(super) fn draining() -> Event {
    MembershipEvent::from(InstanceDraining {}).into()
}

pub(super) fn deregistered() -> Event {
    MembershipEvent::from(InstanceDeregistered {}).into()
}

impl Lane {
    pub(super) fn health(&mut self, instance: usize) -> Event {
        let health = if self.rng.random_range(0..10_u8) == 0 { Health::Unhealthy } else { Health::Healthy };
        let (connect_us, probe) = (self.rng.random_range(80..2_000_u32), self.rng.random::<u64>());
        let (zone, node) = (self.rng.random_range(0..4_u8), self.rng.random_range(0..500_u16));
        let known = &mut self.instances[instance];
        known.revision += 1;
        let detail = format!(
            "tcp connect to the app on port {} took {connect_us} us; 3 of 3 probes agree, 0 of the last 600 failed; probe {probe:016x}; release {}; node-{node:03}.cluster.internal in zone-{zone}",
            known.port, known.release,
        );
        let (revision, doubt) = (known.revision, Some(0));
        HealthEvent::from(HealthReported { health, revision, doubt, detail }).into()
    }

    pub(super) fn registration(&mut self, instance: usize) -> anyhow::Result<Event> {
        let known = &self.instances[instance];
        let host = [10, 0, u8::try_from(self.number)?, u8::try_from(instance)? + 1];
        let metadata = [("release", known.release.to_string()), ("zone", format!("zone-{}", instance % 4))];
        let registered = InstanceRegistered {
            address: IpAddr::V4(Ipv4Addr::from(host)),
            port: port(known.port)?,
            upstreams: Upstreams::Only(self.upstreams.clone()),
            metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        Ok(MembershipEvent::from(registered).into())
    }

    pub(super) fn leaf(&mut self) -> Event {
        let mut hex =
            |words: usize| (0..words).map(|_| format!("{:016x}", self.rng.random::<u64>())).collect();
        let (serial, public_key_sha256) = (hex(2), hex(4));
        let hour = 3_600_000 * self.rng.random_range(0..10_000_i64);
        let (not_before, not_after) = (Timestamp(EPOCH_MS + hour), Timestamp(EPOCH_MS + hour + 3_600_000));
        IdentityEvent::from(LeafIssued { serial, public_key_sha256, not_before, not_after }).into()
    }

    pub(super) fn traffic(&mut self) -> Event {
        let balances = [Balance::LeastConnections, Balance::RoundRobin, Balance::Random];
        let balance = balances[self.rng.random_range(0..balances.len())];
        // A policy that is set to what it is would not be recorded, so two in a row must differ: practically sure.
        let connect =
            ConnectPolicy { timeout_ms: self.rng.random_range(1..60_000), ..ConnectPolicy::default() };
        let policy = TrafficPolicy { balance, connect, ..TrafficPolicy::default() };
        TrafficEvent::from(TrafficPolicySet { policy }).into()
    }

    pub(super) fn security(&mut self, allowed: usize) -> anyhow::Result<Event> {
        let from = Sources { services: [service_name(allowed)?].into(), ..Sources::default() };
        let rules = vec![Rule {
            name: "callers-may-connect".parse()?,
            action: Action::Allow,
            from,
            ports: [port(self.rng.random_range(1..u16::MAX))?].into(),
        }];
        let policy =
            SecurityPolicy { default: Some(Action::Deny), mode: Mode::Enforce, on_change: None, rules };
        Ok(SecurityEvent::from(SecurityPolicySet { policy }).into())
    }
}

fn port(number: u16) -> anyhow::Result<Port> {
    Port::new(number).ok_or_else(|| anyhow::anyhow!("0 is no port"))
}
