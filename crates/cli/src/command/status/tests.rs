use super::*;

const NOW: i64 = 1_772_366_400_000;

fn response() -> v1::StatusResponse {
    let at = |position| Some(v1::ConfigVersion { epoch: 1, position });
    let instance = v1::Instance {
        registration: Some(v1::RegisterInstance {
            instance: "default/db/db-1".into(),
            address: "127.0.0.1".into(),
            port: 7411,
            ..v1::RegisterInstance::default()
        }),
        state: "ready".into(),
        health: v1::Health::Unhealthy.into(),
        health_detail: "connection refused".into(),
        leaf_not_after_ms: NOW + 3_000_000,
        ..v1::Instance::default()
    };
    let service = |name: &str, port, instances| v1::ServiceStatus {
        name: name.into(),
        address: "127.64.0.7".into(),
        ports: vec![v1::ServicePort { name: "sql".into(), port }],
        instances,
    };
    let sidecar = |instance: &str, applied, connected| v1::SidecarStatus {
        instance: instance.into(),
        wanted: at(42),
        applied,
        lag_ms: if applied == at(42) { 0 } else { 3_000 },
        connected,
        last_seen_ms: NOW - 1_000,
        error: String::new(),
        outside_bound: applied == at(40),
    };
    v1::StatusResponse {
        as_of: at(42),
        as_of_ms: NOW - 5_000,
        head: at(43),
        leader: Some(v1::LeaderStatus { holder: "controller-1".into(), term: 2, position: 42 }),
        services: vec![
            service(
                "default/db",
                5432,
                vec![v1::Resource { spec: Some(Spec::Instance(instance)), ..v1::Resource::default() }],
            ),
            service("default/web", 8080, vec![]),
        ],
        sidecars: vec![
            sidecar("default/db/db-1", at(42), true),
            sidecar("default/api/api-1", at(40), true),
            sidecar("default/api/api-2", at(42), false),
            sidecar("default/api/api-3", at(41), true),
        ],
        policies: vec![v1::PolicyStatus {
            scope: "security/default/db".into(),
            version: 3,
            changed_at_ms: NOW - 60_000,
            actor: "spiffe://weft.local/operator/admin/admin".into(),
            summary: "default deny; api-may-query".into(),
        }],
        rewinds: Vec::new(),
        propagation: vec![v1::Propagation {
            version: at(42),
            event: "HealthReported".into(),
            scope: "health/default/db/db-1".into(),
            appended_at_ms: NOW - 5_000,
            folded_ms: 1.5,
            published_ms: 3.25,
            applied_p50_ms: Some(5.5),
            applied_p99_ms: Some(7.0),
            applied_last_ms: Some(7.0),
            last_sidecar: "default/db/db-1".into(),
            interested: 4,
            applied: 2,
        }],
        propagation_bound_ms: 1_000,
        flapping: vec![
            v1::FlappingStatus {
                instance: "default/db/db-1".into(),
                penalty: 3_736,
                suppress: 3_000,
                reported: v1::Health::Healthy.into(),
                held_since_ms: NOW - 7_000,
                held_by: 41,
                hidden: 5,
                release_at_ms: NOW + 69_000,
            },
            v1::FlappingStatus {
                instance: "default/web/web-1".into(),
                penalty: 4_000,
                suppress: 3_000,
                reported: v1::Health::Unhealthy.into(),
                ..v1::FlappingStatus::default()
            },
        ],
    }
}

#[test]
fn a_status_is_read_at_a_glance() {
    let expected = "\
as of 1.42 (5s ago), log at 1.43, controller-1 projects (term 2)

SERVICE       REACHED AT   PORTS      INSTANCE   STATE   HEALTH                          SIDECAR AT       LEAF
default/db    127.64.0.7   sql:5432   db-1       ready   unhealthy: connection refused   127.0.0.1:7411   50m left
default/web   127.64.0.7   sql:8080   -          -       -                               -                -

SIDECAR             WANTED   APPLIED   STATUS                             SEEN
default/db/db-1     1.42     1.42      up to date                         1s ago
default/api/api-1   1.42     1.40      behind for 3s, outside the bound   1s ago
default/api/api-2   1.42     1.42      not connected                      1s ago
default/api/api-3   1.42     1.41      behind for 3s                      1s ago

CHANGE   WHAT                                    APPENDED   SENT MS   P50 MS   P99 MS   LAST MS   APPLIED   LAST
1.42     HealthReported health/default/db/db-1   5s ago     3.2       5.5      7.0      7.0       2 of 4    default/db/db-1

FLAPPING            STATE              POINTS   REPORTS     HELD     BY   HIDDEN   LET GO
default/db/db-1     held down          3736     healthy     7s ago   41   5        in 69s
default/web/web-1   needed, not held   4000     unhealthy   -        -    -        -

POLICY                VERSION   CHANGED   BY            SAYS
security/default/db   3         60s ago   admin/admin   default deny; api-may-query
";
    assert_eq!(text(&Status::of(response()), false, NOW), expected);
}

#[test]
fn a_rewound_log_comes_first() {
    let at = |epoch, position| Some(v1::ConfigVersion { epoch, position });
    let rewind = v1::Rewind {
        id: 1,
        seen: at(1, 50),
        found: at(2, 43),
        witness: "sidecar default/api/api-1".into(),
        ..v1::Rewind::default()
    };
    let status = Status::of(v1::StatusResponse { rewinds: vec![rewind], ..response() });
    let text = text(&status, false, NOW);
    assert!(
        text.starts_with(
            "LOG_REWOUND: sidecar default/api/api-1 has seen event 1.50, and the log ended at 2.43"
        ),
        "{text}"
    );
    assert!(text.contains("`weft log adopt-history`\n\nas of 1.42"), "{text}");
    let value = serde_json::to_value(&status).unwrap();
    assert_eq!(value["log_rewound"][0]["seen"], "1.50");
    assert!(serde_json::to_value(Status::of(response())).unwrap().get("log_rewound").is_none());
}

#[test]
fn the_past_has_no_sidecars() {
    let text = text(&Status::of(response()), true, NOW);
    assert!(text.starts_with("as of 1.42 (5s ago), log at 1.43\n"), "{text}");
    assert!(!text.contains("SIDECAR  "));
}

#[test]
fn there_is_a_time_before_everything() {
    let nothing = v1::StatusResponse { head: response().head, ..v1::StatusResponse::default() };
    assert_eq!(text(&Status::of(nothing), true, NOW), "before the first event; the log is at 1.43\n");
}

#[test]
fn problems_are_told_one_by_one() {
    let problems = Status::of(response()).problems();
    let expected =
        ["default/api/api-1: behind for 3s, outside the bound", "default/api/api-2: not connected"];
    assert_eq!(problems, expected, "who is behind within the bound is about to have it");
}

#[test]
fn programs_read_plain_fields() {
    let value = serde_json::to_value(Status::of(response())).unwrap();
    assert_eq!(value["services"][0]["address"], "127.64.0.7");
    assert_eq!(value["sidecars"][1]["applied"], "1.40");
    assert_eq!(value["as_of_time"], "2026-03-01T11:59:55Z");
}
