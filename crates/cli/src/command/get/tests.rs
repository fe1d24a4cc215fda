use super::*;
use crate::resource::Resource;
use crate::resource::node::Node;

const NOW: i64 = 1_772_366_400_000;

fn resource(spec: Spec) -> v1::Resource {
    v1::Resource {
        scope: "s".into(),
        version: 3,
        position: 42,
        changed_at_ms: NOW - 90_000,
        actor: "spiffe://weft.local/operator/admin/admin".into(),
        reached_at: if matches!(spec, Spec::Service(_)) { "127.64.9.9".into() } else { String::new() },
        spec: Some(spec),
    }
}

fn resources() -> Vec<v1::Resource> {
    let rule = v1::Rule {
        name: "api-may-query".into(),
        action: v1::Action::Allow.into(),
        from_services: vec!["default/api".into()],
        ports: vec![5432],
        ..v1::Rule::default()
    };
    let registration = v1::RegisterInstance {
        instance: "default/api/api-1".into(),
        address: "::1".into(),
        port: 7421,
        upstreams: vec!["default/db".into()],
        metadata: [("zone".to_owned(), "a".to_owned())].into(),
        ..v1::RegisterInstance::default()
    };
    vec![
        resource(Spec::Service(v1::DeclareService {
            name: "default/db".into(),
            ports: vec![v1::ServicePort { name: "sql".into(), port: 5432 }],
            address: "127.64.9.9".into(),
        })),
        resource(Spec::Instance(v1::Instance {
            registration: Some(registration),
            state: "ready".into(),
            health: v1::Health::Healthy.into(),
            ..v1::Instance::default()
        })),
        resource(Spec::TrafficPolicy(v1::PutTrafficPolicy {
            scope: "default/web->default/api".into(),
            policy: Some(v1::TrafficPolicy {
                balance: 2,
                locality: Some(v1::LocalityPreference {
                    prefer: v1::Nearness::Zone.into(),
                    threshold_percent: 55,
                }),
                subsets: vec![v1::Subset {
                    name: "canary".into(),
                    labels: [("version".to_owned(), "2".to_owned())].into(),
                    weight: 5,
                }],
                sticky_sources: true,
                connect_timeout_ms: 1_500,
                connect_retries: 2,
                slow_start_ms: 30_000,
                retry: Some(v1::RetryPolicy { backoff_ms: 0, budget_percent: 7, budget_min_per_second: 8 }),
                limits: Some(v1::CircuitLimits { service_pending: 9, ..v1::CircuitLimits::default() }),
                outlier_detection: Some(v1::OutlierDetection {
                    enabled: false,
                    failures: 4,
                    ejection_base_ms: 1_000,
                    ejection_max_ms: 90_000,
                    ejected_percent_max: 11,
                }),
                connection: Some(v1::ConnectionLifetime {
                    half_open_timeout_ms: 0,
                    idle_timeout_ms: 600_000,
                    max_age_ms: 0,
                }),
            }),
        })),
        resource(Spec::SecurityPolicy(v1::PutSecurityPolicy {
            scope: "default/db".into(),
            policy: Some(v1::SecurityPolicy {
                default: v1::Action::Deny.into(),
                mode: 1,
                rules: vec![rule],
                on_change: v1::OnChange::Grace.into(),
                grace_ms: 90_000,
            }),
        })),
        resource(Spec::MeshDefaults(v1::MeshDefaults {
            security: v1::Action::Deny.into(),
            propagation_bound_ms: 1_000,
            damping: Some(v1::Damping {
                enabled: true,
                half_life_ms: 30_000,
                suppress: 3_000,
                reuse: 750,
                hold_max_ms: 150_000,
            }),
        })),
    ]
}

#[test]
fn each_kind_has_its_table() {
    let expected = "\
SERVICE      ADDRESS      PORTS      VERSION   CHANGED   BY
default/db   127.64.9.9   sql:5432   3         90s ago   admin/admin

INSTANCE            ADDRESS      STATE   HEALTH    UPSTREAMS    VERSION   CHANGED
default/api/api-1   [::1]:7421   ready   healthy   default/db   3         90s ago

TRAFFIC                    BALANCE       TIMEOUT   RETRIES   VERSION   CHANGED   BY
default/web->default/api   round_robin   1500ms    2         3         90s ago   admin/admin

SECURITY     DEFAULT   MODE      RULES           VERSION   CHANGED   BY
default/db   deny      enforce   api-may-query   3         90s ago   admin/admin

MESH   SECURITY   PROPAGATION-BOUND   VERSION   CHANGED   BY
mesh   deny       1s                  3         90s ago   admin/admin
";
    assert_eq!(tables(&resources(), NOW), expected);
}

#[test]
fn what_get_prints_as_yaml_apply_takes_back_unchanged() {
    let given = resources();
    let text = documents(&given).unwrap();
    let nodes = Node::parse_all("out.yaml", &text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let read: Vec<Resource> =
        nodes.into_iter().map(|n| Resource::read(n).unwrap_or_else(|e| panic!("{e}\n{text}"))).collect();
    assert_eq!(read.len(), given.len());
    for (resource, given) in read.iter().zip(&given) {
        let change = crate::resource::wire::put(resource);
        use v1::change::Change;
        match (change.change.unwrap(), given.spec.clone().unwrap()) {
            (Change::DeclareService(back), Spec::Service(given)) => assert_eq!(back, given),
            (Change::RegisterInstance(back), Spec::Instance(given)) => {
                assert_eq!(Some(back), given.registration);
            }
            (Change::PutTrafficPolicy(back), Spec::TrafficPolicy(given)) => assert_eq!(back, given),
            (Change::PutSecurityPolicy(back), Spec::SecurityPolicy(given)) => assert_eq!(back, given),
            (Change::SetMeshDefaults(back), Spec::MeshDefaults(given)) => assert_eq!(back, given),
            (back, given) => panic!("{back:?} from {given:?}"),
        }
        let expected = change.expected.unwrap().expected.unwrap();
        assert_eq!(expected, v1::expected::Expected::Version(3), "the version guards the way back");
    }
}

#[test]
fn json_has_the_document_and_what_the_mesh_knows() {
    let value = serde_json::to_value(Described::of(&resources()[1]).unwrap()).unwrap();
    assert_eq!(value["kind"], "Instance");
    assert_eq!(value["status"]["health"], "healthy");
    assert_eq!(value["last_change"]["position"], 42);
}

#[test]
fn nothing_is_said_as_such() {
    assert_eq!(tables(&[], NOW), "nothing is there\n");
}
