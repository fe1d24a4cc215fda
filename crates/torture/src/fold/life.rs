//! A made-up mesh's life: commands of every kind at random, decided like everybody's, so that only what may happen happens.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;
use weft_model::ca::RootAdded;
use weft_model::damping::DampingSettings;
use weft_model::health::{FlapsSummarized, Health, HealthCommand, HealthReported};
use weft_model::identity::LeafIssued;
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::mesh::{HistoryAdopted, MeshDefaults};
use weft_model::rollout::{Candidate, Evidence, Plan, RolloutCommand, WHOLE_PPM};
use weft_model::security::{self, Action, Mode, OnChange, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::token::{JoinTokenCreated, TokenCommand};
use weft_model::traffic::{Balance, ConnectPolicy, LocalityPolicy, Nearness, TrafficCommand, TrafficPolicy};
use weft_model::{
    Command, Epoch, Event, Fact, InstanceId, Port, Scope, SecurityScope, ServiceName, Timestamp, TokenId,
    TrafficScope,
};
use weft_routing::decide::decide;
use weft_routing::{RoutingState, damping};

const NAMESPACES: [&str; 4] = ["shop", "billing", "search", "platform"];
/// Instances that a service may have, at most.
const INSTANCES: usize = 12;
/// Tokens that wait to be redeemed, at most.
const TOKENS_MAX: usize = 64;

pub(super) struct Life {
    rng: StdRng,
    services: usize,
    /// What commands are decided against.
    state: RoutingState,
    epoch: u64,
    tick: i64,
    tokens: Vec<(TokenId, ServiceName)>,
}

impl Life {
    pub(super) fn new(seed: u64, services: usize) -> Self {
        let rng = StdRng::seed_from_u64(seed ^ 0x5eed);
        Self {
            rng,
            services: services.max(2),
            state: RoutingState::default(),
            epoch: 1,
            tick: 0,
            tokens: Vec::new(),
        }
    }

    /// The next events, at least one and at most so many.
    pub(super) fn next(&mut self, most: usize) -> anyhow::Result<Vec<Fact>> {
        let mut facts = Vec::new();
        while facts.len() < most {
            // Milliseconds, and now and then a quiet minute or two, in which who flapped calms down.
            self.tick += if self.rng.random_bool(0.004) { self.rng.random_range(0..150_000) } else { 1 };
            match self.rng.random_range(0..100_000) {
                0 => {
                    // The server was restarted.
                    self.epoch += 1;
                }
                1..200 => {
                    self.epoch += 1;
                    let fork_position = self.state.version().position.0;
                    let adopted = HistoryAdopted { epoch: self.epoch, fork_position };
                    self.record(Scope::Mesh, Event::Mesh(adopted.into()), &mut facts)?;
                }
                _ => {
                    let due = if self.rng.random_bool(0.05) { self.due() } else { None };
                    let command = due.unwrap_or_else(|| self.command());
                    // What a rule refuses leaves no event.
                    let Ok(decisions) = decide(&self.state, &[command], Timestamp(self.tick)) else {
                        continue;
                    };
                    for decision in decisions {
                        for event in decision.events {
                            self.record(decision.scope.clone(), event, &mut facts)?;
                        }
                    }
                }
            }
        }
        Ok(facts)
    }

    fn record(&mut self, scope: Scope, event: Event, facts: &mut Vec<Fact>) -> anyhow::Result<()> {
        let fact = Fact {
            epoch: Epoch(self.epoch),
            position: self.state.version().position.next(),
            version: self.state.source(&scope).version.next(),
            at: Timestamp(self.tick),
            actor: format!("spiffe://weft.local/operator/admin/{}", self.tick % 7),
            scope,
            event,
        };
        self.state.apply(&fact)?;
        facts.push(fact);
        Ok(())
    }

    fn command(&mut self) -> Command {
        // A mesh begins with services; what asks for one that is not there is refused anyway.
        match self.rng.random_range(0..10_000) {
            0..4_500 => Command::Health(self.instance(), self.health()),
            4_500..7_400 => Command::Membership(self.instance(), self.membership()),
            7_400..8_200 => Command::Identity(self.instance(), self.leaf()),
            8_200..8_700 => {
                let service = self.service_of(0..self.services);
                let command = self.declaration();
                Command::Service(service, command)
            }
            8_700..8_720 => {
                Command::Service(self.service_of(self.inhabited()..self.services), ServiceCommand::Delete)
            }
            8_720..9_200 => Command::Traffic(self.traffic_scope(), self.traffic()),
            9_200..9_700 => Command::Security(self.security_scope(), self.security()),
            9_700..9_920 => self.token(),
            9_920..9_960 => Command::Rollout(self.rollout()),
            9_960..9_980 => Command::Mesh(MeshDefaults {
                security: self.action(),
                propagation_bound_ms: self.rng.random_range(10..5_000),
                damping: DampingSettings { enabled: self.rng.random_bool(0.8), ..DampingSettings::default() },
            }),
            _ => Command::Ca(self.root()),
        }
    }

    /// The services below have instances; those above have none, and so may be deleted.
    const fn inhabited(&self) -> usize {
        self.services - self.services.div_ceil(10)
    }

    fn service(&mut self) -> ServiceName {
        self.service_of(0..self.services)
    }

    fn service_of(&mut self, numbers: Range<usize>) -> ServiceName {
        let number = self.rng.random_range(numbers);
        name(&format!("{}/service-{number}", NAMESPACES[number % NAMESPACES.len()]))
    }

    /// One service is busier than the others: its instances come, go and flap often enough to be damped.
    fn instance(&mut self) -> InstanceId {
        let numbers = if self.rng.random_bool(0.3) { 0..1 } else { 0..self.inhabited() };
        let service = self.service_of(numbers);
        name(&format!("{service}/i-{}", self.rng.random_range(0..INSTANCES)))
    }

    fn action(&mut self) -> Action {
        if self.rng.random() { Action::Allow } else { Action::Deny }
    }

    fn port(&mut self) -> Port {
        name(["80", "443", "5432"][self.rng.random_range(0..3)])
    }

    /// A held endpoint that is to be let go, if there is one; whoever leads asks for it.
    fn due(&mut self) -> Option<Command> {
        let due = damping::due(&self.state, Timestamp(self.tick));
        let place = self.rng.random_range(0..due.len().max(1));
        due.into_iter().nth(place).map(|id| Command::Health(id, HealthCommand::Reconsider))
    }

    fn health(&mut self) -> HealthCommand {
        match self.rng.random_range(0..20) {
            0 => HealthCommand::Reconsider,
            1 | 2 => HealthCommand::Summarize(FlapsSummarized {
                downs: self.rng.random_range(0..8),
                ups: self.rng.random_range(0..8),
                over_ms: self.rng.random_range(0..20_000),
                last: self.report(),
            }),
            _ => HealthCommand::Report(self.report()),
        }
    }

    fn report(&mut self) -> HealthReported {
        let health = if self.rng.random() { Health::Healthy } else { Health::Unhealthy };
        // Now and then one that came too late.
        let late = if self.rng.random_bool(0.02) { 1_000 } else { 0 };
        let revision = u64::try_from((self.tick - late).max(1)).unwrap_or(1);
        // Now and then one that damping does not count.
        let doubt = self.rng.random_bool(0.9).then_some(0);
        HealthReported { health, revision, doubt, detail: format!("probe {}", self.tick % 100) }
    }

    fn membership(&mut self) -> MembershipCommand {
        match self.rng.random_range(0..10) {
            0 => MembershipCommand::Drain,
            1 => MembershipCommand::Deregister,
            2 => MembershipCommand::AddUpstream { service: self.service(), port: self.port() },
            _ => MembershipCommand::Register(self.registration()),
        }
    }

    fn registration(&mut self) -> InstanceRegistered {
        let upstreams = match self.rng.random_range(0..100) {
            0..4 => Upstreams::All,
            4..8 => Upstreams::Only((0..60).map(|_| self.service()).collect()),
            _ => {
                let few = self.rng.random_range(0..4);
                Upstreams::Only((0..few).map(|_| self.service()).collect())
            }
        };
        InstanceRegistered {
            address: Ipv4Addr::new(10, 0, self.rng.random_range(0..2), self.rng.random_range(1..250)).into(),
            port: self.port(),
            upstreams,
            metadata: BTreeMap::from([
                ("build".into(), (self.tick % 10).to_string()),
                ("zone".into(), (self.tick % 3).to_string()),
            ]),
        }
    }

    fn leaf(&mut self) -> LeafIssued {
        LeafIssued {
            serial: format!("{:032x}", self.rng.random::<u128>()),
            public_key_sha256: format!("{:064x}", self.rng.random::<u128>()),
            not_before: Timestamp(self.tick),
            not_after: Timestamp(self.tick + 3_600_000),
        }
    }

    fn declaration(&mut self) -> ServiceCommand {
        if self.rng.random_bool(0.05) {
            return ServiceCommand::Delete;
        }
        let ports: BTreeMap<Port, ServicePort> = (0..self.rng.random_range(1..3))
            .map(|_| self.port())
            .map(|port| (port, ServicePort { name: name(&format!("p{port}")), port }))
            .collect();
        ServiceCommand::Declare(ServiceDeclared { ports: ports.into_values().collect(), address: None })
    }

    fn traffic_scope(&mut self) -> TrafficScope {
        let source = self.rng.random_bool(0.5).then(|| self.service());
        TrafficScope { source, destination: self.service() }
    }

    fn traffic(&mut self) -> TrafficCommand {
        if self.rng.random_bool(0.2) {
            return TrafficCommand::Delete;
        }
        TrafficCommand::Put(TrafficPolicy {
            balance: Balance::ALL[self.rng.random_range(0..Balance::ALL.len())],
            locality: LocalityPolicy {
                prefer: Nearness::ALL[self.rng.random_range(0..Nearness::ALL.len())],
                ..LocalityPolicy::default()
            },
            connect: ConnectPolicy {
                timeout_ms: self.rng.random_range(1..5_000),
                retries: self.rng.random_range(0..4),
                ..ConnectPolicy::default()
            },
            ..TrafficPolicy::default()
        })
    }

    fn security_scope(&mut self) -> SecurityScope {
        match self.rng.random_range(0..200) {
            0 => SecurityScope::Mesh,
            1..5 => SecurityScope::Namespace(name(NAMESPACES[self.rng.random_range(0..NAMESPACES.len())])),
            _ => SecurityScope::Service(self.service()),
        }
    }

    fn security(&mut self) -> SecurityCommand {
        if self.rng.random_bool(0.2) {
            return SecurityCommand::Delete;
        }
        let rules = (0..self.rng.random_range(0..4)).map(|number| self.rule(number)).collect();
        let default = self.rng.random_bool(0.5).then(|| self.action());
        let mode = if self.rng.random_bool(0.2) { Mode::Audit } else { Mode::Enforce };
        let on_change = match self.rng.random_range(0..6) {
            0 => Some(OnChange::Cut),
            1 => Some(OnChange::Grace(self.rng.random_range(security::GRACE_MS))),
            2 => Some(OnChange::Keep),
            _ => None,
        };
        SecurityCommand::Put(SecurityPolicy { default, mode, on_change, rules })
    }

    fn rule(&mut self, number: usize) -> Rule {
        let from = match self.rng.random_range(0..3) {
            0 => Sources { any: true, ..Sources::default() },
            1 => Sources { services: [self.service(), self.service()].into(), ..Sources::default() },
            _ => Sources {
                namespaces: [name(NAMESPACES[number % NAMESPACES.len()])].into(),
                ..Sources::default()
            },
        };
        let ports = if self.rng.random() { [self.port()].into() } else { [].into() };
        Rule { name: name(&format!("r{number}")), action: self.action(), from, ports }
    }

    /// Begins one, or ends the one that runs.
    fn rollout(&mut self) -> RolloutCommand {
        if self.state.running_rollout().is_some() {
            let evidence = Evidence { connections: self.rng.random_range(0..1_000), ..Evidence::default() };
            return if self.rng.random() {
                RolloutCommand::Advance(evidence)
            } else {
                RolloutCommand::Abort { reason: format!("at {}", self.tick), evidence }
            };
        }
        let policies = (0..self.rng.random_range(1..4)).map(|_| {
            if self.rng.random() {
                Command::Traffic(self.traffic_scope(), self.traffic())
            } else {
                Command::Security(self.security_scope(), self.security())
            }
        });
        RolloutCommand::Begin(Plan {
            candidates: policies.filter_map(Candidate::of).collect(),
            share_ppm: self.rng.random_range(1..=WHOLE_PPM),
            watch_ms: 60_000,
            tolerance_ppm: 10_000,
        })
    }

    fn token(&mut self) -> Command {
        let secret = |id: &TokenId| format!("{:0>64}", id.to_string());
        if !self.tokens.is_empty() && (self.rng.random() || self.tokens.len() >= TOKENS_MAX) {
            let place = self.rng.random_range(0..self.tokens.len());
            let (id, service) = self.tokens.swap_remove(place);
            let instance = name(&format!("{service}/i-{}", self.rng.random_range(0..INSTANCES)));
            return Command::Token(id.clone(), TokenCommand::Redeem { secret_sha256: secret(&id), instance });
        }
        let id: TokenId = name(&format!("{:032x}", self.rng.random::<u128>()));
        let service = self.service();
        self.tokens.push((id.clone(), service.clone()));
        let created = JoinTokenCreated {
            secret_sha256: secret(&id),
            service,
            instance: None,
            expires_at: Timestamp(self.tick).after(Duration::from_secs(3_600)),
        };
        Command::Token(id, TokenCommand::Create(created))
    }

    fn root(&mut self) -> RootAdded {
        let number = self.rng.random_range(0..4);
        RootAdded {
            trust_domain: name("weft.local"),
            certificate_pem: format!("root {number}"),
            sha256: format!("{number:064}"),
        }
    }
}

/// Reads a name that is written here, so it is one.
#[expect(clippy::panic, reason = "a name that is written in this file")]
fn name<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} is no name"))
}
