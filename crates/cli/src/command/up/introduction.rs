//! What a newcomer reads when everything is up: what runs, and lines that work when pasted into another terminal in the
//! same folder.

use crate::context;
use crate::failure::{Failure, Outcome};
use crate::output::table::Table;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use weft_localmesh::home::{HOME_DIR, Home};
use weft_localmesh::{LocalMesh, Sidecar};

pub(super) async fn text(mesh: &LocalMesh) -> Outcome<String> {
    let sidecars = mesh.sidecars().await;
    let mut table = Table::new(&["SERVICE", "INSTANCE", "IDENTITY", "CONFIG", "APP", "SIDECAR"]);
    for sidecar in &sidecars {
        table.row([
            sidecar.service.clone(),
            sidecar.instance.clone(),
            sidecar.identity.clone().unwrap_or_default(),
            sidecar.config_version.clone().unwrap_or_default(),
            format!("127.0.0.1:{}", sidecar.app_port),
            format!("127.0.0.1:{}", sidecar.inbound_port),
        ]);
    }
    let reached = Reached {
        sidecars: &sidecars,
        api: mesh.service_address("default/api").await,
        db: mesh.service_address("default/db").await,
    };
    let words = Words::here(mesh.home())?;
    let hints = hints(mesh.home(), &words, &reached, mesh.data_elsewhere().as_deref());
    Ok(format!("\n{}\n{hints}", table.render()))
}

/// Where the sample services are.
struct Reached<'s> {
    sidecars: &'s [Sidecar],
    api: Option<String>,
    db: Option<String>,
}

/// How `weft` is called from a folder.
#[derive(Debug, PartialEq, Eq)]
struct Words {
    weft: String,
    /// What names this mesh to commands about a mesh, and to those about a home; empty where they find it themselves.
    context: String,
    home: String,
}

impl Words {
    fn here(home: &Home) -> Outcome<Self> {
        let failure = |error: std::io::Error| Failure::from_error(&error);
        let here = std::env::current_dir().map_err(failure)?;
        let weft = std::env::current_exe().map_err(failure)?;
        Ok(Self::of(home, &here, &weft, std::env::var_os("PATH").as_deref()))
    }

    /// From the folder `here`, for the program `weft`, with that search path.
    fn of(home: &Home, here: &Path, weft: &Path, path: Option<&OsStr>) -> Self {
        let found = path.and_then(|path| {
            std::env::split_paths(path).map(|dir| dir.join("weft")).find(|file| file.is_file())
        });
        let same = |found: PathBuf| found.canonicalize().ok() == weft.canonicalize().ok();
        let option = |name: &str, value: &Path| format!(" {name} {}", quoted(&from(here, value)));
        let found_by_itself = context::nearest_to(here).is_some_and(|file| file == home.context());
        Self {
            weft: if found.is_some_and(same) { "weft".to_owned() } else { quoted(&from(here, weft)) },
            context: if found_by_itself { String::new() } else { option("--context", &home.context()) },
            home: if home.dir() == here.join(HOME_DIR) {
                String::new()
            } else {
                option("--home", home.dir())
            },
        }
    }
}

/// A path as short as it can be written in a folder; always with a `/`, so that a shell does not search for it.
fn from(here: &Path, path: &Path) -> PathBuf {
    match path.strip_prefix(here) {
        Ok(below) if below.components().count() == 1 => Path::new(".").join(below),
        Ok(below) => below.to_owned(),
        Err(_) => path.to_owned(),
    }
}

/// As a shell takes it for one word.
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    if path.chars().all(|c| c.is_alphanumeric() || "/._-+:@%,".contains(c)) {
        return path;
    }
    format!("'{}'", path.replace('\'', r"'\''"))
}

fn hints(home: &Home, words: &Words, reached: &Reached<'_>, data_elsewhere: Option<&Path>) -> String {
    let pgpass = quoted(&home.secret("pgpass"));
    let psql = |host: &str, port: u16| {
        format!("PGPASSFILE={pgpass} psql -h {host} -p {port} -U shop -d shop -c 'select * from orders'")
    };
    let of = |instance: &str| reached.sidecars.iter().find(|sidecar| sidecar.instance == instance);
    let mut text = String::from("Try, in another terminal in this folder:\n");
    let mut hint = |what: &str, line: String| text.push_str(&format!("  # {what}\n  {line}\n"));
    if let Some(web) = of("web-1") {
        hint("a request through web → api → db", format!("curl -s http://127.0.0.1:{}/", web.app_port));
    }
    if let Some(address) = &reached.api {
        hint("api as web sees it, at its own address", format!("curl -s http://{address}:8080/"));
    }
    if let Some(port) = of("api-1").and_then(|api| api.outbound_port) {
        hint("the database as api sees it: a real client through two sidecars", psql("127.0.0.1", port));
    }
    if let Some(address) = &reached.db {
        hint("the database as web sees it: refused, web may not query db", psql(address, 5432));
    }
    let Words { weft, context, home: in_home } = words;
    text.push_str("\nThen:\n");
    for command in ["status", "log", "why web db:5432", "sql 'select * from status.sidecars'"] {
        text.push_str(&format!("  {weft} {command}{context}\n"));
    }
    text.push_str(&format!(
        "\nResources: {} · logs: {}\n",
        home.resources().display(),
        home.logs().display()
    ));
    text.push_str(&format!(
        "Ctrl-C or `{weft} down{in_home}` stops everything; `{weft} up{in_home}` goes on with the same log.\n"
    ));
    let data = data_elsewhere.map(|data| format!(" {}", quoted(data))).unwrap_or_default();
    text.push_str(&format!("To begin anew after that: `rm -r {}{data}`\n", quoted(home.dir())));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn sidecar(instance: &str, outbound_port: Option<u16>) -> Sidecar {
        Sidecar {
            service: "default/x".into(),
            instance: instance.into(),
            app: None,
            identity: None,
            config_version: None,
            app_port: 7413,
            inbound_port: 7411,
            admin_port: 7412,
            outbound_port,
        }
    }

    #[test]
    fn hints_are_lines_to_paste_without_a_secret_in_them() {
        let sidecars = [sidecar("web-1", Some(7414)), sidecar("api-1", Some(7424))];
        let reached =
            Reached { sidecars: &sidecars, api: Some("127.64.0.7".into()), db: Some("127.64.0.8".into()) };
        let words = Words {
            weft: "target/debug/weft".into(),
            context: " --context c".into(),
            home: " --home h".into(),
        };
        let text = hints(&Home::at("/m/.weft"), &words, &reached, Some(Path::new("/var/lib/weft/pg-x")));
        for line in [
            "curl -s http://127.0.0.1:7413/",
            "curl -s http://127.64.0.7:8080/",
            "PGPASSFILE=/m/.weft/secrets/pgpass psql -h 127.0.0.1 -p 7424 -U shop -d shop -c 'select * from orders'",
            "psql -h 127.64.0.8 -p 5432",
            "target/debug/weft why web db:5432 --context c\n",
            "`target/debug/weft down --home h`",
            "`rm -r /m/.weft /var/lib/weft/pg-x`",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_program_is_called_by_the_shortest_words_that_work() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().canonicalize().unwrap();
        let weft = here.join("target/weft");
        let home = Home::at(here.join(HOME_DIR));
        for dir in [here.join("target"), here.join("other"), home.dir().to_owned()] {
            fs::create_dir(dir).unwrap();
        }
        for file in [weft.clone(), here.join("other/weft"), home.context()] {
            fs::write(file, "").unwrap();
        }
        let word = |here: &Path, path: &[&str]| {
            let path = std::env::join_paths(path.iter().map(|dir| here.join(dir))).unwrap();
            Words::of(&home, here, &weft, Some(&path)).weft
        };
        assert_eq!(word(&here, &["absent", "target"]), "weft");
        assert_eq!(word(&here, &["other", "target"]), "target/weft", "another program comes first");
        assert_eq!(word(&here, &[]), "target/weft");
        assert_eq!(word(&here.join("target"), &[]), "./weft");
        assert_eq!(word(&here.join("other"), &[]), weft.display().to_string());

        let at_home = Words::of(&home, &here, &weft, None);
        assert_eq!((at_home.context.as_str(), at_home.home.as_str()), ("", ""));
        let below = Words::of(&home, &here.join("other"), &weft, None);
        assert_eq!((below.context.as_str(), below.home), ("", format!(" --home {}", home.dir().display())));
        let elsewhere = Words::of(&home, Path::new("/"), &weft, None);
        assert_eq!(
            elsewhere.context,
            format!(" --context {}", from(Path::new("/"), &home.context()).display())
        );
        assert_eq!(quoted(Path::new("it's here/weft")), r"'it'\''s here/weft'");
    }
}
