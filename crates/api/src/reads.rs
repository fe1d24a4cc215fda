//! Get, Status and Why: questions about the mesh at one moment, answered from one projection.

use weft_eventlog::Rewind;
use weft_model::rollout::{Evidence, Witnessed};
use weft_model::{ConfigVersion, InstanceId, Scope, ServiceName, Timestamp};
use weft_projector::rows::{rollout_summary, security_summary, traffic_summary};
use weft_projector::{LeaderStatus, Propagation, SidecarStatus};
use weft_proto::v1 as pb;
use weft_routing::damping::Damping;
use weft_routing::why::{Explanation, explain};
use weft_routing::{Projection, RoutingState};

use crate::convert::{self, config_version, resources, service_ports};
use crate::status::ApiError;

/// The running rollout and what its canaries say, or how the last one ended.
pub(crate) fn rollout(
    state: &RoutingState,
    canaries: Vec<(InstanceId, Witnessed)>,
) -> pb::GetRolloutResponse {
    let entry = state.rollout();
    let Some(summary) = rollout_summary(&entry.state) else { return pb::GetRolloutResponse::default() };
    let begun = entry.state.running();
    let canary = |(instance, witnessed): (InstanceId, Witnessed)| {
        let Witnessed { watched, error, evidence } = witnessed;
        let Evidence { connections, refused, failed } = evidence.unwrap_or_default();
        pb::CanaryStatus {
            instance: instance.to_string(),
            applied: watched.is_some(),
            error: error.unwrap_or_default(),
            watched_ms: u64::try_from(watched.unwrap_or_default().as_millis()).unwrap_or(u64::MAX),
            connections,
            refused,
            failed,
        }
    };
    pb::GetRolloutResponse {
        state: entry.state.as_str().to_owned(),
        version: entry.source.version.0,
        summary,
        position: entry.source.position.0,
        at_ms: entry.at.0,
        by: entry.actor.clone(),
        scopes: begun
            .iter()
            .flat_map(|begun| &begun.candidates)
            .map(|candidate| candidate.scope().to_string())
            .collect(),
        watch_ms: begun.map(|begun| begun.watch_ms).unwrap_or_default(),
        tolerance_ppm: begun.map(|begun| begun.tolerance_ppm).unwrap_or_default(),
        canaries: canaries.into_iter().map(canary).collect(),
    }
}

/// Resources, as [`pb::GetRequest`] asks.
pub(crate) fn get(projection: &Projection, kind: pb::Kind, name: &str) -> Result<pb::GetResponse, ApiError> {
    let state = projection.state();
    let all = kind == pb::Kind::Unspecified;
    let mut found = Vec::new();
    if all || kind == pb::Kind::Service {
        found.extend(match name {
            "" => state.services().filter_map(|(service, _)| resources::service(state, service)).collect(),
            text => one(text, |service| resources::service(state, &service), all)?,
        });
    }
    if all || kind == pb::Kind::Instance {
        found.extend(match name {
            "" => state.instances().filter_map(|(id, _)| resources::instance(state, id)).collect(),
            text => one(text, |id| resources::instance(state, &id), all)?,
        });
    }
    if all || kind == pb::Kind::TrafficPolicy {
        found.extend(match name {
            "" => state.traffic().filter_map(|(scope, _)| resources::traffic_policy(state, scope)).collect(),
            text => one(text, |scope| resources::traffic_policy(state, &scope), all)?,
        });
    }
    if all || kind == pb::Kind::SecurityPolicy {
        found.extend(match name {
            "" => {
                state.security().filter_map(|(scope, _)| resources::security_policy(state, scope)).collect()
            }
            text => one(text, |scope| resources::security_policy(state, &scope), all)?,
        });
    }
    if (all && name.is_empty()) || kind == pb::Kind::MeshDefaults {
        found.push(resources::mesh_defaults(state));
    }
    if found.is_empty() && !name.is_empty() {
        return Err(ApiError::NotFound(format!("there is no {name} as of {}", projection.version())));
    }
    Ok(pb::GetResponse { as_of: Some(config_version(projection.version())), resources: found })
}

/// The one resource of that name. When every kind is asked for, a text that is no name of this kind is one of another.
fn one<T: std::str::FromStr>(
    text: &str,
    look: impl Fn(T) -> Option<pb::Resource>,
    any_kind: bool,
) -> Result<Vec<pb::Resource>, ApiError>
where
    T::Err: std::error::Error,
{
    match convert::name::<T>("name", text) {
        Ok(name) => Ok(look(name).into_iter().collect()),
        Err(_) if any_kind => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The mesh at a glance, at a moment.
pub(crate) fn status(
    projection: &Projection,
    head: ConfigVersion,
    leader: &LeaderStatus,
    sidecars: Vec<pb::SidecarStatus>,
    now: Timestamp,
) -> pb::StatusResponse {
    let state = projection.state();
    pb::StatusResponse {
        as_of: Some(config_version(projection.version())),
        as_of_ms: state.at().0,
        head: Some(config_version(head)),
        leader: Some(pb::LeaderStatus {
            holder: leader.holder.clone(),
            term: leader.term,
            position: leader.checkpoint.position.0,
        }),
        services: state.services().map(|(service, _)| service_status(state, service)).collect(),
        sidecars,
        policies: policies(state),
        rewinds: Vec::new(),
        propagation: Vec::new(),
        propagation_bound_ms: state.mesh().state.propagation_bound_ms,
        flapping: state.damped().filter_map(|(id, damping)| flapping(state, &id, damping, now)).collect(),
    }
}

/// How a version reached its sidecars.
pub(crate) fn propagation(change: Propagation) -> pb::Propagation {
    pb::Propagation {
        version: Some(config_version(change.version)),
        event: change.event,
        scope: change.scope,
        appended_at_ms: change.appended_at_ms,
        folded_ms: change.folded_ms,
        published_ms: change.published_ms,
        applied_p50_ms: change.p50_ms,
        applied_p99_ms: change.p99_ms,
        applied_last_ms: change.last_ms,
        last_sidecar: change.last_sidecar,
        interested: change.interested,
        applied: change.applied,
    }
}

/// How an endpoint flaps, as long as it has points left.
fn flapping(
    state: &RoutingState,
    id: &InstanceId,
    damping: &Damping,
    now: Timestamp,
) -> Option<pb::FlappingStatus> {
    let settings = &state.mesh().state.damping;
    let penalty = damping.penalty_at(now, settings).points();
    if penalty == 0 && damping.held.is_none() {
        return None;
    }
    Some(pb::FlappingStatus {
        instance: id.to_string(),
        penalty,
        suppress: settings.suppress,
        reported: resources::health(damping.reported).into(),
        held_since_ms: damping.held.map_or(0, |held| held.since.0),
        held_by: damping.held.map_or(0, |held| held.source.position.0),
        hidden: damping.held.map_or(0, |held| held.hidden),
        release_at_ms: damping.release_at(settings).map_or(0, |at| at.0),
    })
}

/// What somebody has seen and the log does not have.
pub(crate) fn rewind(rewind: Rewind) -> pb::Rewind {
    pb::Rewind {
        id: rewind.id,
        seen: Some(config_version(rewind.seen.version())),
        seen_hash: rewind.seen.hash.0.to_vec().into(),
        found: Some(config_version(rewind.found)),
        found_hash: rewind.found_hash.map(|hash| hash.0.to_vec().into()).unwrap_or_default(),
        witness: rewind.witness,
        reported_at_ms: rewind.reported_at.millis(),
    }
}

/// What sidecars run now.
pub(crate) fn sidecar(status: SidecarStatus) -> pb::SidecarStatus {
    pb::SidecarStatus {
        instance: status.instance.to_string(),
        wanted: Some(config_version(status.wanted)),
        applied: status.applied.map(config_version),
        lag_ms: status.lag_ms,
        outside_bound: status.outside_bound,
        connected: status.connected,
        last_seen_ms: status.last_seen_ms,
        error: status.error,
    }
}

/// What sidecars should have run then; what they ran is not in the log.
pub(crate) fn past_sidecars(projection: &Projection) -> Vec<pb::SidecarStatus> {
    let status = |id: &InstanceId| {
        let wanted = projection.wanted(id)?;
        Some(pb::SidecarStatus {
            instance: id.to_string(),
            wanted: Some(config_version(wanted.version)),
            ..pb::SidecarStatus::default()
        })
    };
    projection.sidecars().filter_map(status).collect()
}

fn service_status(state: &RoutingState, service: &ServiceName) -> pb::ServiceStatus {
    let declared = state.service(service).and_then(|entry| entry.state.as_ref());
    pb::ServiceStatus {
        name: service.to_string(),
        address: state.address(service).map(|address| address.to_string()).unwrap_or_default(),
        ports: declared.map(|declared| service_ports(&declared.ports)).unwrap_or_default(),
        instances: state
            .live_instances_of(service)
            .filter_map(|(id, ..)| resources::instance(state, &id))
            .collect(),
    }
}

fn policies(state: &RoutingState) -> Vec<pb::PolicyStatus> {
    let traffic = state.traffic().filter_map(|(scope, entry)| {
        let summary = traffic_summary(entry.state.as_ref()?);
        Some(policy(&Scope::Traffic(scope.clone()), entry, summary))
    });
    let security = state.security().filter_map(|(scope, entry)| {
        let summary = security_summary(entry.state.as_ref()?);
        Some(policy(&Scope::Security(scope.clone()), entry, summary))
    });
    traffic.chain(security).collect()
}

fn policy<S>(scope: &Scope, entry: &weft_routing::state::Entry<S>, summary: String) -> pb::PolicyStatus {
    pb::PolicyStatus {
        scope: scope.to_string(),
        version: entry.source.version.0,
        changed_at_ms: entry.at.0,
        actor: entry.actor.clone(),
        summary,
    }
}

/// Whether a connection would pass, and why.
pub(crate) fn why(projection: &Projection, request: &pb::WhyRequest) -> Result<pb::WhyResponse, ApiError> {
    let source = convert::service("source", &request.source)?;
    let destination = convert::service("destination", &request.destination)?;
    let port = convert::port("port", request.port)?;
    let explained = explain(projection, &source, &destination, port);
    let Explanation { as_of, refusal, summary, steps } =
        explained.map_err(|error| ApiError::Internal(weft_model::Chain(&error).to_string()))?;
    let step = |step: weft_routing::why::Step| {
        let (scope, source) =
            step.rests_on.map(|(scope, source)| (scope.to_string(), source)).unwrap_or_default();
        pb::WhyStep {
            question: step.question,
            answer: step.answer,
            passed: step.refusal.is_none(),
            scope,
            version: source.version.0,
            position: source.position.0,
        }
    };
    Ok(pb::WhyResponse {
        as_of: Some(config_version(as_of)),
        permitted: refusal.is_none(),
        reason: refusal.map(|reason| reason.as_str().to_owned()).unwrap_or_default(),
        summary,
        steps: steps.into_iter().map(step).collect(),
    })
}
