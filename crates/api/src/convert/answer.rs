//! Model to wire: versions, events, ports.

use weft_eventlog::RecordedEvent;
use weft_model::ConfigVersion;
use weft_model::service::ServicePort;
use weft_proto::v1 as pb;

pub(crate) fn config_version(version: ConfigVersion) -> pb::ConfigVersion {
    pb::ConfigVersion { epoch: version.epoch.0, position: version.position.0 }
}

pub(crate) fn log_event(event: RecordedEvent) -> pb::LogEvent {
    pb::LogEvent {
        epoch: event.epoch.0,
        position: event.position.0,
        scope: event.scope,
        version: event.version.0,
        r#type: event.event_type,
        schema: u32::from(event.schema),
        actor: event.actor,
        reason: event.reason.unwrap_or_default(),
        cause: event.cause.map_or(0, |cause| cause.0),
        command_id: event.command_id.to_string(),
        recorded_at_us: event.recorded_at.0,
        payload: event.payload,
        hash: event.hash.0.to_vec().into(),
    }
}

pub(crate) fn service_ports(ports: &[ServicePort]) -> Vec<pb::ServicePort> {
    let port = |port: &ServicePort| pb::ServicePort {
        name: port.name.to_string(),
        port: u32::from(port.port.number()),
    };
    ports.iter().map(port).collect()
}
