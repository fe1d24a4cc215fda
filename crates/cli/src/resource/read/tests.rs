use super::*;
use crate::resource::wire;

fn read(text: &str) -> Result<Vec<Resource>, String> {
    let nodes = Node::parse_all("mesh.yaml", text).map_err(|error| error.to_string())?;
    nodes.into_iter().map(|node| Resource::read(node).map_err(|error| error.to_string())).collect()
}

fn error(text: &str) -> String {
    read(text).unwrap_err()
}

#[test]
fn the_smallest_useful_mesh_is_read() {
    let text = "
kind: Service
name: default/db
ports: [{ name: sql, port: 5432 }]
---
kind: SecurityPolicy
scope: default/db
default: deny
rules:
  - { name: api-may-query, action: allow, from: { services: [default/api] }, ports: [5432] }
---
kind: TrafficPolicy
scope: default/api
balance: least_connections
connect: { timeout: 500ms, retries: 2 }
---
kind: MeshDefaults
version: 3
propagation_bound: 2s
";
    let resources = read(text).unwrap();
    let names: Vec<&str> = resources.iter().map(|resource| resource.name.as_str()).collect();
    assert_eq!(names, ["default/db", "default/db", "default/api", "mesh"]);
    assert_eq!(resources[3].expected, ExpectedVersion::Exact(Version(3)));
    let Command::Traffic(_, TrafficCommand::Put(policy)) = &resources[2].command else { panic!() };
    assert_eq!((policy.connect.timeout_ms, policy.connect.retries), (500, 2));
    assert!(resources.iter().all(|resource| wire::put(resource).change.is_some()));
}

/// Every mistake of the golden file is told as it says: place, field, what is allowed.
#[test]
fn mistakes_are_told_with_place_field_and_what_is_allowed() {
    let golden = include_str!("mistakes.txt");
    let mut cases = 0;
    for case in golden.split("=== ").skip(1) {
        let (title, rest) = case.split_once('\n').unwrap();
        let (input, expected) = rest.split_once("--> ").unwrap();
        assert_eq!(error(input), expected.trim(), "{title}");
        cases += 1;
    }
    assert!(cases >= 15, "{cases}");
}

#[test]
fn what_a_controller_refuses_is_traced_to_its_line() {
    let text = "kind: SecurityPolicy\nscope: default/db\nrules:\n  - name: a\n    action: allow\n    from: { any: true }\n";
    let resources = read(text).unwrap();
    let place = resources[0].explain("rules[0].from", "no").place.to_string();
    assert_eq!(place, "mesh.yaml:6:11");
    assert_eq!(resources[0].explain("", "no").place.to_string(), "mesh.yaml:1:1");

    let text = "kind: SecurityPolicy\nscope: default/db\nrules:\n  - name: a\n    action: allow\n    from: { services: [default/ghost] }\n";
    let resources = read(text).unwrap();
    let unknown = "service default/ghost is not declared; declare it first, or in the same apply";
    assert_eq!(resources[0].explain("", unknown).place.to_string(), "mesh.yaml:6:24");
}

/// The reference names every field that can be written, and its examples can be applied.
#[test]
fn the_reference_documents_every_field_and_its_examples_are_right() {
    let reference = include_str!("../../../../../docs/resources.md");
    for (mapping, fields) in FIELDS {
        let section = reference.split("\n#").find(|section| {
            section.trim_start_matches('#').trim_start().starts_with(&format!("{mapping}\n"))
        });
        let section = section.unwrap_or_else(|| panic!("docs/resources.md has no section \"{mapping}\""));
        for field in *fields {
            assert!(
                section.contains(&format!("| `{field}` |")),
                "docs/resources.md: {mapping} lacks {field}"
            );
        }
    }
    let mut examples = 0;
    for example in reference.split("```yaml\n").skip(1) {
        let example = example.split("```").next().unwrap();
        let resources = read(example).unwrap_or_else(|error| panic!("{error}\n{example}"));
        assert!(!resources.is_empty(), "{example}");
        examples += resources.len();
    }
    assert!(examples >= Kind::ALL.len());
}

#[test]
fn the_sample_mesh_is_right() {
    assert_eq!(read(include_str!("../../../../localmesh/samples/mesh.yaml")).unwrap().len(), 6);
}
