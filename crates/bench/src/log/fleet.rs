//! The load: a mesh that lives. Services are declared, instances register, get leaves, report their health, are replaced;
//! policies change. Every event is one that the mesh's own rules allow and that the fold understands, with payloads of
//! some 200 bytes.
//!
//! A [`Lane`] is one service with all that belongs to it. Lanes share no scope, so whoever has a lane for itself knows the
//! version of each of its scopes without asking the log. A fleet is all lanes; it follows from its seed alone.

mod events;

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;
use weft_eventlog::{AppendRequest, NewEvent, ScopeAppend};
use weft_model::{
    Event, ExpectedVersion, InstanceId, Scope, SecurityScope, ServiceName, TrafficScope, Version,
};

/// Services: as many as there are callers at most, so that each caller has one of its own.
pub(crate) const LANES: usize = 256;
/// Instances of a service; with [`SCOPES_PER_INSTANCE`] this makes some 20,000 scopes.
const INSTANCES_PER_LANE: usize = 26;
/// Membership, health, identity.
const SCOPES_PER_INSTANCE: usize = 3;
/// The service itself, its traffic and its security policy.
const SCOPES_PER_SERVICE: usize = 3;
/// Scopes of a whole fleet.
pub(crate) const SCOPES: usize = LANES * (SCOPES_PER_SERVICE + SCOPES_PER_INSTANCE * INSTANCES_PER_LANE);
/// Draining, deregistered, registered, observed.
const EVENTS_OF_A_REPLACEMENT: usize = 4;
/// Services that an instance connects to.
const UPSTREAMS: usize = 3;
/// Who does it all.
const ACTOR: &str = "spiffe://weft.local/controller/controller-1";

/// All lanes, in order.
pub(crate) type Fleet = Vec<Lane>;

/// A fleet that has not begun.
pub(crate) fn fleet(seed: u64) -> anyhow::Result<Fleet> {
    (0..LANES).map(|number| Lane::new(number, seed)).collect()
}

/// One event for one scope, and the version that the scope has before it.
#[derive(Debug)]
pub(crate) struct Single {
    pub(crate) scope: String,
    pub(crate) version: u64,
    pub(crate) event: NewEvent,
}

/// One service, its instances and policies.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) number: usize,
    /// Whose it is at the moment.
    pub(crate) caller: usize,
    rng: SmallRng,
    upstreams: BTreeSet<ServiceName>,
    scopes: Vec<Known>,
    instances: Vec<Instance>,
    /// The instance whose health is reported next.
    turn: usize,
}

#[derive(Debug)]
struct Known {
    scope: String,
    version: u64,
}

#[derive(Debug)]
struct Instance {
    revision: u64,
    release: u32,
    port: u16,
}

/// Where the scopes of a lane stand in it.
const SERVICE: usize = 0;
const TRAFFIC: usize = 1;
const SECURITY: usize = 2;

const fn membership_of(instance: usize) -> usize {
    SCOPES_PER_SERVICE + SCOPES_PER_INSTANCE * instance
}

const fn health_of(instance: usize) -> usize {
    membership_of(instance) + 1
}

const fn identity_of(instance: usize) -> usize {
    membership_of(instance) + 2
}

impl Lane {
    fn new(number: usize, seed: u64) -> anyhow::Result<Self> {
        let service = service_name(number)?;
        let mut scopes = vec![
            Scope::Service(service.clone()),
            Scope::Traffic(TrafficScope { destination: service.clone(), source: None }),
            Scope::Security(SecurityScope::Service(service.clone())),
        ];
        for instance in 0..INSTANCES_PER_LANE {
            let id = InstanceId {
                service: service.clone(),
                instance: format!("{}-{instance}", service.name).parse()?,
            };
            scopes.extend([Scope::Membership(id.clone()), Scope::Health(id.clone()), Scope::Identity(id)]);
        }
        let upstreams = (1..=UPSTREAMS).map(|next| service_name((number + next * 7) % LANES));
        Ok(Self {
            number,
            caller: 0,
            rng: SmallRng::seed_from_u64(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            upstreams: upstreams.collect::<Result<_, _>>()?,
            scopes: scopes.into_iter().map(|scope| Known { scope: scope.to_string(), version: 0 }).collect(),
            instances: (0..INSTANCES_PER_LANE)
                .map(|_| Instance { revision: 0, release: 1, port: 8_080 })
                .collect(),
            turn: 0,
        })
    }

    /// A health report of the next instance. Counts as accepted: whoever asks sees it through.
    pub(crate) fn report(&mut self) -> anyhow::Result<Single> {
        let instance = self.next_instance();
        let event = encoded(&self.health(instance))?;
        let known = &mut self.scopes[health_of(instance)];
        known.version += 1;
        Ok(Single { scope: known.scope.clone(), version: known.version - 1, event })
    }

    /// A health report whose author does not know the last one: it is refused, and counts for nothing.
    pub(crate) fn stale_report(&mut self) -> anyhow::Result<Single> {
        let instance = self.next_instance();
        let event = encoded(&self.health(instance))?;
        let known = &self.scopes[health_of(instance)];
        anyhow::ensure!(known.version > 0, "{} has no event that one could have missed", known.scope);
        Ok(Single { scope: known.scope.clone(), version: known.version - 1, event })
    }

    /// Whether something comes to pass that does so `percent` times of a hundred.
    pub(crate) fn chance(&mut self, percent: u8) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// Reports of randomly chosen instances, in one request.
    pub(crate) fn reports(&mut self, count: usize) -> anyhow::Result<AppendRequest> {
        let mut events = Vec::with_capacity(count);
        for _ in 0..count {
            let instance = self.rng.random_range(0..INSTANCES_PER_LANE);
            events.push((health_of(instance), self.health(instance)));
        }
        self.request(events)
    }

    /// Reports of one instance, in one request.
    pub(crate) fn reports_of_one(&mut self, count: usize) -> anyhow::Result<AppendRequest> {
        let instance = self.next_instance();
        let events = (0..count).map(|_| (health_of(instance), self.health(instance))).collect();
        self.request(events)
    }

    /// The service is declared, its instances register and are observed: how a history begins. Other lanes' histories go
    /// on from there, since policies name services.
    pub(crate) fn beginning(&mut self) -> anyhow::Result<AppendRequest> {
        let mut events = vec![
            (SERVICE, events::declaration()?),
            (TRAFFIC, self.traffic()),
            (SECURITY, self.security(self.number)?),
        ];
        for instance in 0..INSTANCES_PER_LANE {
            events.push((membership_of(instance), self.registration(instance)?));
            events.push((health_of(instance), self.health(instance)));
            events.push((identity_of(instance), self.leaf()));
        }
        self.request(events)
    }

    /// The service's life as it goes on, at least `count` events of it in one request.
    pub(crate) fn history(&mut self, count: usize) -> anyhow::Result<AppendRequest> {
        let mut events = Vec::with_capacity(count + EVENTS_OF_A_REPLACEMENT);
        while events.len() < count {
            let instance = self.rng.random_range(0..INSTANCES_PER_LANE);
            match self.rng.random_range(0..100_u8) {
                0..3 => {
                    self.instances[instance].release += 1;
                    events.push((membership_of(instance), self.registration(instance)?));
                }
                3..5 => self.replace(instance, &mut events)?,
                5..8 => events.push((TRAFFIC, self.traffic())),
                8..10 => {
                    let allowed = self.rng.random_range(0..LANES);
                    events.push((SECURITY, self.security(allowed)?));
                }
                10..15 => events.push((identity_of(instance), self.leaf())),
                _ => events.push((health_of(instance), self.health(instance))),
            }
        }
        self.request(events)
    }

    /// An instance leaves and comes back somewhere else.
    fn replace(&mut self, instance: usize, events: &mut Vec<(usize, Event)>) -> anyhow::Result<()> {
        events.push((membership_of(instance), events::draining()));
        events.push((membership_of(instance), events::deregistered()));
        self.instances[instance].port = self.rng.random_range(8_000..9_000);
        events.push((membership_of(instance), self.registration(instance)?));
        events.push((health_of(instance), self.health(instance)));
        Ok(())
    }

    fn next_instance(&mut self) -> usize {
        self.turn = (self.turn + 1) % INSTANCES_PER_LANE;
        self.turn
    }

    /// One command of these events, in the order of their scopes' first ones; each scope as far as it is known here.
    fn request(&mut self, events: Vec<(usize, Event)>) -> anyhow::Result<AppendRequest> {
        let mut parts: BTreeMap<usize, Vec<NewEvent>> = BTreeMap::new();
        for (scope, event) in events {
            parts.entry(scope).or_default().push(encoded(&event)?);
        }
        let scopes = parts.into_iter().map(|(scope, events)| {
            let known = &mut self.scopes[scope];
            let expected = exactly(known.version);
            known.version += events.len() as u64;
            ScopeAppend { scope: known.scope.clone(), expected, events }
        });
        Ok(command(scopes.collect()))
    }
}

impl Single {
    /// The command that appends it.
    pub(crate) fn into_request(self) -> AppendRequest {
        let expected = exactly(self.version);
        command(vec![ScopeAppend { scope: self.scope, expected, events: vec![self.event] }])
    }
}

fn command(scopes: Vec<ScopeAppend>) -> AppendRequest {
    AppendRequest {
        command_id: Uuid::now_v7(),
        fingerprint: None,
        actor: ACTOR.to_owned(),
        reason: None,
        cause: None,
        scopes,
    }
}

const fn exactly(version: u64) -> ExpectedVersion {
    if version == 0 { ExpectedVersion::Empty } else { ExpectedVersion::Exact(Version(version)) }
}

fn encoded(event: &Event) -> anyhow::Result<NewEvent> {
    Ok(NewEvent {
        event_type: event.type_name().to_owned(),
        schema: event.schema(),
        payload: event.payload()?,
    })
}

fn service_name(number: usize) -> anyhow::Result<ServiceName> {
    Ok(format!("prod/service-{number:03}").parse()?)
}

#[cfg(test)]
mod tests;
