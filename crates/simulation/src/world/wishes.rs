//! What people and sidecars may want of the mesh, drawn at random, and the names that it has.

use rand::RngExt;
use rand::seq::IndexedRandom;
use std::collections::{BTreeMap, BTreeSet};
use weft_model::ca::RootAdded;
use weft_model::health::{Health, HealthCommand, HealthReported};
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::rollout::{Candidate, Evidence, Plan, RolloutCommand, WHOLE_PPM};
use weft_model::security::{Action, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{Balance, TrafficCommand, TrafficPolicy};
use weft_model::{Command, InstanceId, SecurityScope, ServiceName, TrafficScope, TrustDomain};

use super::World;

/// The name of the mesh.
const TRUST_DOMAIN: &str = "weft.test";

impl World {
    pub(super) fn draw_changes(&mut self) -> Vec<Command> {
        let service = self.rng.random_range(0..self.plan.services);
        let name = service_name(service);
        let instance = self.rng.random_range(0..self.sidecars.len());
        let id = self.sidecars[instance].instance.clone();
        let roll = self.rng.random_range(0..100);
        let command = match roll {
            0..38 => {
                let health = if self.chance(0.6) { Health::Healthy } else { Health::Unhealthy };
                let revision = self.now.as_micros().try_into().unwrap_or(u64::MAX - 1);
                let report = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
                Command::Health(id, HealthCommand::Report(report))
            }
            38..76 => self.policy(name),
            76..84 => declare(service, self.rng.random_range(80..84)),
            84..88 => Command::Membership(id, MembershipCommand::Drain),
            88..92 => Command::Membership(id, MembershipCommand::Deregister),
            92..95 => self.register(instance),
            95..98 => Command::Rollout(self.rollout()),
            _ => return (0..self.plan.services).map(|service| declare(service, 90)).collect(),
        };
        vec![command]
    }

    /// A policy for a service, or for the whole mesh.
    fn policy(&mut self, service: ServiceName) -> Command {
        match self.rng.random_range(0..38) {
            0..22 => {
                let default = if self.chance(0.5) { Action::Allow } else { Action::Deny };
                let mut policy = SecurityPolicy { default: Some(default), ..SecurityPolicy::default() };
                if self.chance(0.5) {
                    let from = service_name(self.rng.random_range(0..self.plan.services));
                    let from = Sources { services: BTreeSet::from([from]), ..Sources::default() };
                    let (name, ports) = (names("rule"), BTreeSet::new());
                    policy.rules.push(Rule { name, action: Action::Deny, from, ports });
                }
                let scope =
                    if self.chance(0.2) { SecurityScope::Mesh } else { SecurityScope::Service(service) };
                Command::Security(scope, SecurityCommand::Put(policy))
            }
            22..28 => Command::Security(SecurityScope::Service(service), SecurityCommand::Delete),
            _ => {
                let balance = *[Balance::LeastConnections, Balance::RoundRobin, Balance::Random]
                    .choose(&mut self.rng)
                    .unwrap_or(&Balance::Random);
                let scope = TrafficScope { source: None, destination: service };
                let policy = TrafficPolicy { balance, ..TrafficPolicy::default() };
                Command::Traffic(scope, TrafficCommand::Put(policy))
            }
        }
    }

    /// Begins a rollout, or ends the one that may be running; who finds it otherwise is refused.
    fn rollout(&mut self) -> RolloutCommand {
        match self.rng.random_range(0..4) {
            0 => RolloutCommand::Advance(Evidence::default()),
            1 => RolloutCommand::Abort { reason: "simulated".into(), evidence: Evidence::default() },
            _ => {
                let service = service_name(self.rng.random_range(0..self.plan.services));
                let candidates = Candidate::of(self.policy(service)).into_iter().collect();
                let share_ppm = self.rng.random_range(1..=WHOLE_PPM);
                RolloutCommand::Begin(Plan { candidates, share_ppm, watch_ms: 60_000, tolerance_ppm: 0 })
            }
        }
    }

    /// What a sidecar registers as. Its upstreams change now and then, as with another configuration.
    pub(super) fn register(&mut self, sidecar: usize) -> Command {
        let all = self.chance(0.3);
        let services = self.plan.services;
        let upstreams = if all {
            Upstreams::All
        } else {
            Upstreams::Only((0..services).filter(|_| self.rng.random_bool(0.6)).map(service_name).collect())
        };
        let it = &self.sidecars[sidecar];
        let registered = InstanceRegistered {
            address: [127, 0, 0, 1].into(),
            port: names(&(15_000 + sidecar).to_string()),
            upstreams,
            metadata: BTreeMap::new(),
        };
        Command::Membership(it.instance.clone(), MembershipCommand::Register(registered))
    }
}

/// A name that is written here, hence is one.
#[expect(clippy::panic, reason = "the simulation is for developers, and its names are its own")]
fn names<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} is no name"))
}

/// The name of the mesh.
pub(crate) fn trust_domain() -> TrustDomain {
    names(TRUST_DOMAIN)
}

pub(crate) fn service_name(service: usize) -> ServiceName {
    names(&format!("default/s{service}"))
}

pub(crate) fn instance_id(service: usize, instance: usize) -> InstanceId {
    names(&format!("default/s{service}/i{instance}"))
}

pub(super) fn root() -> Command {
    Command::Ca(RootAdded {
        trust_domain: trust_domain(),
        certificate_pem: "not parsed here".into(),
        sha256: "00".into(),
    })
}

pub(super) fn declare(service: usize, port: u16) -> Command {
    let port = ServicePort { name: names("main"), port: names(&port.to_string()) };
    let declared = ServiceDeclared { ports: vec![port], address: None };
    Command::Service(service_name(service), ServiceCommand::Declare(declared))
}
