//! What the generator makes is what the mesh's rules allow, and folds.

use super::events::EPOCH_MS;
use super::*;
use weft_model::health::HealthCommand;
use weft_model::health::HealthEvent;
use weft_model::identity::IdentityEvent;
use weft_model::membership::{MembershipCommand, MembershipEvent};
use weft_model::security::{SecurityCommand, SecurityEvent};
use weft_model::service::{ServiceCommand, ServiceEvent};
use weft_model::traffic::{TrafficCommand, TrafficEvent};
use weft_model::{Command, Epoch, Fact, Position, Timestamp};
use weft_routing::RoutingState;
use weft_routing::decide::decide;

/// The command whose outcome is this event.
fn cause(scope: Scope, event: Event) -> Command {
    match (event, scope) {
        (Event::Service(ServiceEvent::ServiceDeclared(declared)), Scope::Service(id)) => {
            Command::Service(id, ServiceCommand::Declare(declared))
        }
        (Event::Membership(event), Scope::Membership(id)) => Command::Membership(
            id,
            match event {
                MembershipEvent::InstanceRegistered(registered) => MembershipCommand::Register(registered),
                MembershipEvent::InstanceDraining(_) => MembershipCommand::Drain,
                MembershipEvent::InstanceDeregistered(_) => MembershipCommand::Deregister,
                MembershipEvent::UpstreamAdded(_) => unreachable!("a fleet adds no upstreams"),
            },
        ),
        (Event::Health(HealthEvent::HealthReported(report)), Scope::Health(id)) => {
            Command::Health(id, HealthCommand::Report(report))
        }
        (Event::Traffic(TrafficEvent::TrafficPolicySet(set)), Scope::Traffic(id)) => {
            Command::Traffic(id, TrafficCommand::Put(set.policy))
        }
        (Event::Security(SecurityEvent::SecurityPolicySet(set)), Scope::Security(id)) => {
            Command::Security(id, SecurityCommand::Put(set.policy))
        }
        (Event::Identity(IdentityEvent::LeafIssued(leaf)), Scope::Identity(id)) => {
            Command::Identity(id, leaf)
        }
        (event, scope) => panic!("{event:?} in {scope}"),
    }
}

/// Appends in memory, as the log and the fold would.
#[derive(Default)]
struct Memory {
    state: RoutingState,
    payload_bytes: usize,
}

impl Memory {
    fn append(&mut self, request: AppendRequest) {
        for part in request.scopes {
            let scope: Scope = part.scope.parse().unwrap();
            let mut version = self.state.source(&scope).version;
            assert_eq!(part.expected, exactly(version.0), "{scope}");
            for new in part.events {
                let event = Event::decode(&scope, &new.event_type, new.schema, &new.payload).unwrap();
                let command = cause(scope.clone(), event.clone());
                let decided = decide(&self.state, &[command], Timestamp(EPOCH_MS)).unwrap();
                assert_eq!(decided[0].events, std::slice::from_ref(&event), "{scope}");
                version = version.next();
                let position = self.state.version().position.next();
                let (actor, scope) = (ACTOR.to_owned(), scope.clone());
                let fact =
                    Fact { epoch: Epoch(1), position, version, at: Timestamp(EPOCH_MS), actor, scope, event };
                self.state.apply(&fact).unwrap();
                self.payload_bytes += new.payload.len();
            }
        }
    }
}

#[test]
fn a_history_is_one_that_the_mesh_allows_with_payloads_of_some_200_bytes() {
    let mut fleet = fleet(7).unwrap();
    let mut memory = Memory::default();
    for lane in &mut fleet {
        memory.append(lane.beginning().unwrap());
    }
    for lane in &mut fleet {
        memory.append(lane.history(20).unwrap());
        memory.append(lane.reports(10).unwrap());
        memory.append(lane.reports_of_one(10).unwrap());
        memory.append(lane.report().unwrap().into_request());
        let stale = lane.stale_report().unwrap();
        let known = lane.scopes.iter().find(|known| known.scope == stale.scope).unwrap();
        assert_eq!(stale.version + 1, known.version);
    }
    let events = usize::try_from(memory.state.version().position.0).unwrap();
    let average = memory.payload_bytes / events;
    assert!((170..=230).contains(&average), "{average} bytes over {events} events");
    assert_eq!(memory.state.version().position, Position(events as u64));
}

#[test]
fn the_same_seed_makes_the_same_history() {
    let payloads = |seed| {
        let mut fleet = fleet(seed).unwrap();
        let request = fleet[3].beginning().unwrap();
        request.scopes.into_iter().flat_map(|part| part.events).collect::<Vec<_>>()
    };
    assert_eq!(payloads(1), payloads(1));
    assert_ne!(payloads(1), payloads(2));
}
