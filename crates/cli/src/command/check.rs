//! `weft check`: with `-f`, whether files are right, without any mesh; else, whether this machine and its mesh are.

use crate::command::status;
use crate::context::{Context, ContextArgs};
use crate::failure::{Exit, Outcome};
use crate::output::print;
use crate::resource::files;
use std::path::PathBuf;
use weft_localmesh::Programs;
use weft_localmesh::home::{HOME_DIR, Home};

#[derive(Debug, clap::Args)]
#[command(after_help = "Exits with 2 if something is not as it should be.")]
pub(crate) struct Args {
    /// Check these files instead: a file, a folder with .yaml files, or - for standard input
    #[arg(short = 'f', long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    what: &'static str,
    /// What was seen, or what is wrong and what to do.
    seen: Result<String, String>,
}

pub(crate) async fn run(args: &Args, context: &ContextArgs) -> Outcome<Exit> {
    if !args.files.is_empty() {
        return check_files(&args.files);
    }
    let mut findings = machine();
    match context.load() {
        Ok(context) => findings.extend(mesh(&context).await),
        Err(failure) => findings.push(Finding { what: "mesh", seen: Err(failure.brief()) }),
    }
    print(&text(&findings))?;
    Ok(if findings.iter().all(|finding| finding.seen.is_ok()) { Exit::Ok } else { Exit::CheckFailed })
}

fn check_files(files: &[PathBuf]) -> Outcome<Exit> {
    match files::load(files) {
        Ok(resources) => {
            print(&format!("{} resources are right; apply them with `weft apply`\n", resources.len()))?;
            Ok(Exit::Ok)
        }
        Err(mut failure) => {
            failure.exit = Exit::CheckFailed;
            Err(failure)
        }
    }
}

/// What `weft up` needs.
fn machine() -> Vec<Finding> {
    let postgres = weft_pgserver::Binaries::find();
    let postgres = postgres
        .map(|found| format!("version {} in {}", found.major(), found.dir().display()))
        .map_err(|error| format!("{error}; `weft up` installs it where it may"));
    let programs = std::env::current_exe().map_err(|error| error.to_string()).and_then(|weft| {
        let programs = Programs::beside(&weft);
        let missing = [&programs.controller, &programs.proxy].into_iter().find(|program| !program.is_file());
        match missing {
            Some(program) => {
                Err(format!("{} is missing; build it with `cargo build --workspace`", program.display()))
            }
            None => Ok(format!("weft-controller and weft-proxy are beside {}", weft.display())),
        }
    });
    vec![Finding { what: "PostgreSQL", seen: postgres }, Finding { what: "programs", seen: programs }]
}

/// Whether the mesh answers and everybody in it runs what it should.
async fn mesh(context: &Context) -> Vec<Finding> {
    let mut findings = Vec::new();
    if context.file().parent().is_some_and(|dir| dir.file_name().is_some_and(|name| name == HOME_DIR)) {
        findings.push(Finding { what: "local mesh", seen: local_mesh(context) });
    }
    let status = match status::fetch(context).await {
        Ok(status) => status,
        Err(failure) => {
            findings.push(Finding { what: "controller", seen: Err(failure.brief()) });
            return findings;
        }
    };
    findings.push(Finding { what: "controller", seen: Ok(format!("answers at {}", context.controllers())) });
    if let Some(rewound) = status.rewound() {
        findings.push(Finding { what: "log", seen: Err(rewound) });
    }
    let problems = status.problems();
    let sidecars = match problems.as_slice() {
        [] => Ok(format!("all {} run what they should", status.sidecars())),
        problems => Err(format!("{}; see `weft status` and .weft/logs/", problems.join("; "))),
    };
    findings.push(Finding { what: "sidecars", seen: sidecars });
    findings.push(Finding { what: "database", seen: database(context).await });
    findings
}

fn local_mesh(context: &Context) -> Result<String, String> {
    let home = Home::at(context.file().parent().unwrap_or(context.file()));
    match home.holder() {
        Ok(Some(pid)) => Ok(format!("process {pid} runs it in {}", home.dir().display())),
        Ok(None) => Err("it is not running; start it with `weft up`".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

async fn database(context: &Context) -> Result<String, String> {
    let reader = weft_eventlog::Reader::new(context.reader().map_err(|failure| failure.brief())?);
    let head = reader.head().await.map_err(|error| crate::failure::chain(&error))?;
    Ok(format!("readable; the log is at {}.{}", head.epoch, head.position))
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { what, seen } in findings {
        let (mark, seen) = match seen {
            Ok(seen) => ("ok  ", seen),
            Err(seen) => ("FAIL", seen),
        };
        text.push_str(&format!("{mark}  {what}: {seen}\n"));
    }
    let ok = findings.iter().filter(|finding| finding.seen.is_ok()).count();
    text.push_str(&format!("check: {ok}/{} ok\n", findings.len()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_counted() {
        let findings = [
            Finding { what: "a", seen: Ok("fine".into()) },
            Finding { what: "b", seen: Err("broken; mend it".into()) },
        ];
        assert_eq!(text(&findings), "ok    a: fine\nFAIL  b: broken; mend it\ncheck: 1/2 ok\n");
    }
}
