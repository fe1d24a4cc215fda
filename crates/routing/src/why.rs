//! Explains a verdict to people: the questions that the data plane asks on the way of a connection, in its order, with
//! the events that the answers rest on. Evaluates the very shards that sidecars get.

use crate::damping::Penalty;
use crate::projection::Projection;
use crate::shard::{Endpoint, EndpointsShard, InboundShard, ShardError, ShardKey};
use crate::state::Instance;
use crate::verdict::{Decider, authorize, authorize_live};
use weft_model::health::Health;
use weft_model::security::OnChange;
use weft_model::{CloseReason, ConfigVersion, InstanceId, Port, Scope, ScopeVersion, ServiceName};

/// Whether a connection would pass, and every step of the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The state that it is about.
    pub as_of: ConfigVersion,
    /// The reason that the connection's record would have; none if it would pass.
    pub refusal: Option<CloseReason>,
    /// One sentence.
    pub summary: String,
    /// The questions and answers.
    pub steps: Vec<Step>,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What was asked.
    pub question: String,
    /// What the answer is.
    pub answer: String,
    /// What the connection's record would say if it stops here; none if it passes.
    pub refusal: Option<CloseReason>,
    /// What the answer rests on, if on something.
    pub rests_on: Option<(Scope, ScopeVersion)>,
}

/// Explains a connection from an instance of `source` to `port` of `destination`.
///
/// # Errors
/// If a shard does not decode, which is a fault of this program.
pub fn explain(
    projection: &Projection,
    source: &ServiceName,
    destination: &ServiceName,
    port: Port,
) -> Result<Explanation, ShardError> {
    let shard = |key: ShardKey| projection.shards().get(&key).map(|shard| &shard.bytes);
    let endpoints = shard(ShardKey::Endpoints(destination.clone()));
    let endpoints = endpoints.map(|bytes| EndpointsShard::decode(bytes)).transpose()?;
    let inbound = shard(ShardKey::Inbound(destination.clone()));
    let inbound = inbound.map(|bytes| InboundShard::decode(bytes)).transpose()?;

    let mut steps = vec![
        declared(projection, "source", source),
        declared(projection, "destination", destination),
        has_port(projection, destination, endpoints.as_ref(), port),
        in_view(projection, source, destination),
        has_endpoint(projection, destination, endpoints.as_ref()),
    ];
    steps.extend(flapping(projection, destination));
    steps.extend(tried(projection, source, destination, port)?);
    steps.extend(inbound.iter().map(|inbound| allowed(inbound, source, port)));

    let stop = steps.iter().find(|step| step.refusal.is_some());
    let route = format!("{source} -> {destination}:{port}");
    let summary = match stop.or(steps.last()) {
        Some(Step { refusal: Some(reason), answer, .. }) => format!("{route} is refused: {reason}, {answer}"),
        Some(Step { refusal: None, answer, .. }) => format!("{route} passes: {answer}"),
        None => route,
    };
    let refusal = stop.and_then(|step| step.refusal);
    Ok(Explanation { as_of: projection.version(), refusal, summary, steps })
}

fn declared(projection: &Projection, role: &str, service: &ServiceName) -> Step {
    let entry = projection.state().service(service);
    let exists = entry.is_some_and(|entry| entry.state.is_some());
    Step {
        question: format!("is the {role} {service} a service of the mesh?"),
        answer: match entry {
            Some(_) if exists => "it is declared".into(),
            Some(_) => "it was deleted".into(),
            None => format!("nobody declared {service}"),
        },
        refusal: (!exists).then_some(CloseReason::NoSnapshot),
        rests_on: entry.map(|entry| (Scope::Service(service.clone()), entry.source)),
    }
}

fn has_port(
    projection: &Projection,
    service: &ServiceName,
    endpoints: Option<&EndpointsShard>,
    port: Port,
) -> Step {
    let ports = endpoints.map(|shard| shard.ports.as_slice()).unwrap_or_default();
    let named = ports.iter().find(|declared| declared.port == port);
    let list: Vec<_> =
        ports.iter().map(|declared| format!("{} ({})", declared.port, declared.name)).collect();
    Step {
        question: format!("does {service} have port {port}?"),
        answer: match named {
            Some(declared) => format!("it is its port {}", declared.name),
            None if list.is_empty() => format!("{service} has no ports"),
            None => format!("{service} has only {}", list.join(", ")),
        },
        refusal: named.is_none().then_some(CloseReason::NoSnapshot),
        rests_on: projection
            .state()
            .service(service)
            .map(|entry| (Scope::Service(service.clone()), entry.source)),
    }
}

fn in_view(projection: &Projection, source: &ServiceName, destination: &ServiceName) -> Step {
    let state = projection.state();
    let live: Vec<_> = state.live_instances_of(source).collect();
    let with =
        live.iter().filter(|(_, _, registration)| registration.upstreams.contains(destination)).count();
    let without = live.iter().find(|(_, _, registration)| !registration.upstreams.contains(destination));
    let (answer, passes) = match (live.len(), with) {
        (0, _) => (format!("{source} has no instance now; one with this upstream could"), true),
        (all, with) if all == with => (format!("all {all} instance(s) of {source} do"), true),
        (all, 0) => (format!("none of the {all} instance(s) of {source} names it as an upstream"), false),
        (all, with) => (format!("only {with} of {all} instances of {source} do"), true),
    };
    let witness = without.or(live.first());
    Step {
        question: format!("do sidecars of {source} hold {destination} in their snapshots?"),
        answer,
        refusal: (!passes).then_some(CloseReason::NoSnapshot),
        rests_on: witness.map(|(id, entry, _)| (Scope::Membership(id.clone()), entry.source)),
    }
}

fn has_endpoint(projection: &Projection, service: &ServiceName, endpoints: Option<&EndpointsShard>) -> Step {
    let all = endpoints.map(|shard| shard.endpoints.as_slice()).unwrap_or_default();
    let takes = |endpoint: &Endpoint| endpoints.is_some_and(|shard| shard.takes(endpoint));
    let taking = all.iter().filter(|endpoint| takes(endpoint)).count();
    let held = |endpoint: &Endpoint| {
        let id = InstanceId { service: service.clone(), instance: endpoint.instance.clone() };
        projection.state().held.contains(&id)
    };
    let ailing: Vec<_> = all
        .iter()
        .filter(|endpoint| !endpoint.eligible())
        .map(|endpoint| match (endpoint.draining, endpoint.health) {
            (true, _) => format!("{} is draining", endpoint.instance),
            (false, Health::Unknown) => format!("{} was not observed yet", endpoint.instance),
            (false, _) if held(endpoint) => format!("{} is held down, because it flaps", endpoint.instance),
            (false, health) => format!("{} is {}", endpoint.instance, health.as_str()),
        })
        .collect();
    let mut answer = match all.len() {
        0 => "it has no instance".to_owned(),
        all => format!("{taking} of {all}"),
    };
    if endpoints.is_some_and(|shard| shard.panic) {
        answer = format!("{answer}, in panic: so few are healthy that unhealthy ones are tried as well");
    }
    if !ailing.is_empty() {
        answer = format!("{answer}; {}", ailing.join(", "));
    }
    let newest = all.iter().max_by_key(|endpoint| endpoint.position);
    Step {
        question: format!("how many endpoints of {service} take new connections?"),
        answer,
        refusal: (taking == 0).then_some(CloseReason::NoHealthyEndpoint),
        rests_on: newest.and_then(|endpoint| {
            let id = InstanceId { service: service.clone(), instance: endpoint.instance.clone() };
            let membership = projection.state().membership(&id)?.source;
            let health = projection.state().effective_health(&id).source;
            Some(if health.position > membership.position {
                (Scope::Health(id), health)
            } else {
                (Scope::Membership(id), membership)
            })
        }),
    }
}

/// Endpoints that flap: which events hold them down, or why they are not held. No connection is refused for that alone.
fn flapping(projection: &Projection, service: &ServiceName) -> Vec<Step> {
    /// One that has more than this has other worries.
    const SHOWN_MAX: usize = 8;
    let state = projection.state();
    let settings = &state.mesh().state.damping;
    let step = |(id, instance): (InstanceId, &Instance)| {
        let damping = instance.damping.as_ref()?;
        let penalty = damping.penalty_at(state.at(), settings);
        let too_many = penalty > Penalty::of(settings.suppress.into());
        let (points, suppress, reuse) = (penalty.points(), settings.suppress, settings.reuse);
        let (answer, source) = match damping.held {
            Some(held) => {
                let end = match damping.release_at(settings) {
                    Some(at) => format!("let go in {} s if it stays up", at.since(state.at()).as_secs()),
                    None => "let go once it is up and calm".to_owned(),
                };
                let hidden = held.hidden;
                let answer = format!(
                    "it went down with more than {suppress} points, so it is held down until it is calm and has fewer \
                     than {reuse}; it has {points}; {hidden} change(s) were not published; {end}"
                );
                (answer, held.source)
            }
            None if too_many && settings.enabled => {
                let answer =
                    format!("{points} points, more than {suppress}, but its service needs it: not held");
                (answer, instance.health.source)
            }
            None => return None,
        };
        Some(Step {
            question: format!("does {} flap?", id.instance),
            answer,
            refusal: None,
            rests_on: Some((Scope::Health(id), source)),
        })
    };
    state.live_of(service).filter_map(step).take(SHOWN_MAX).collect()
}

/// What a running rollout changes, if it has a policy for this way. It refuses nothing to everybody.
fn tried(
    projection: &Projection,
    source: &ServiceName,
    destination: &ServiceName,
    port: Port,
) -> Result<Option<Step>, ShardError> {
    let variant = |key: ShardKey| projection.variants().get(&key).map(|shard| &shard.bytes);
    let inbound = variant(ShardKey::Inbound(destination.clone()));
    let inbound = inbound.map(|bytes| InboundShard::decode(bytes)).transpose()?;
    let steered = variant(ShardKey::Endpoints(destination.clone())).is_some();
    let Some((begun, since)) = projection.state().running_rollout() else { return Ok(None) };
    let of =
        |service: &ServiceName| begun.canaries.iter().filter(|canary| canary.service == *service).count();
    let mut parts = Vec::new();
    if steered && of(source) > 0 {
        parts.push(format!("{} sidecar(s) of {source} try another traffic policy", of(source)));
    }
    if let Some(inbound) = inbound.filter(|_| of(destination) > 0) {
        let ruling = authorize(&inbound, source, port).ruling;
        let (action, by) = (ruling.action.as_str(), &ruling.by);
        parts.push(format!("{} sidecar(s) of {destination} try {action} by {by}", of(destination)));
    }
    Ok((!parts.is_empty()).then(|| Step {
        question: "does a rollout try something else?".to_owned(),
        answer: parts.join("; "),
        refusal: None,
        rests_on: Some((Scope::Rollout, since)),
    }))
}

fn allowed(inbound: &InboundShard, source: &ServiceName, port: Port) -> Step {
    let verdict = authorize(inbound, source, port);
    let by = &verdict.ruling.by;
    let mut answer = format!("{} by {by}", verdict.ruling.action.as_str());
    if let Some(shadow) = &verdict.would_refuse {
        answer = format!("{answer}; {} in audit mode would deny", shadow.by);
    }
    match authorize_live(inbound, source, port).map(|forbidden| forbidden.on_change) {
        None | Some(OnChange::Cut) => {}
        Some(OnChange::Grace(ms)) => {
            answer = format!("{answer}; connections that were let in before get a grace of {ms} ms");
        }
        Some(OnChange::Keep) => answer = format!("{answer}; connections that were let in before are kept"),
    }
    let scope = match by {
        Decider::Rule { scope, .. } | Decider::PolicyDefault { scope, .. } => {
            Scope::Security((*scope).clone())
        }
        Decider::MeshDefault { .. } => Scope::Mesh,
    };
    Step {
        question: format!("does policy let {source} connect to port {port}?"),
        answer,
        refusal: (!verdict.permitted()).then_some(CloseReason::PolicyDenied),
        rests_on: Some((scope, by.source())),
    }
}
