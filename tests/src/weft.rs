//! The command line, run as a person runs it.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;

/// How long a command may take. The slowest are those that wait for a controller that does not come.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// `weft`, talking to one mesh.
#[derive(Clone, Debug)]
pub struct Weft {
    program: PathBuf,
    context: PathBuf,
}

/// How a command ended and what it printed.
#[derive(Clone, Debug)]
pub struct Said {
    line: String,
    /// Its exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Its answer.
    pub stdout: String,
    /// Its complaint.
    pub stderr: String,
}

impl Weft {
    /// The program, and the context file of a mesh.
    pub fn new(program: impl Into<PathBuf>, context: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), context: context.into() }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs it to its end, whatever that is.
    ///
    /// # Errors
    ///
    /// It cannot be run, or does not end in time.
    pub async fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> anyhow::Result<Said> {
        let mut command = program(&self.program);
        command.arg("--context").arg(&self.context).args(args);
        run(command).await
    }

    /// What it printed, if it ended well.
    ///
    /// # Errors
    ///
    /// It did not.
    pub async fn ok<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> anyhow::Result<String> {
        let said = self.run(args).await?;
        ensure!(said.status == Some(0), "{said}");
        Ok(said.stdout)
    }

    /// Its answer as JSON, asked for with `-o json`.
    ///
    /// # Errors
    ///
    /// It did not end well, or did not print JSON.
    pub async fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let said = self.run(args.iter().copied().chain(["-o", "json"])).await?;
        ensure!(said.status == Some(0), "{said}");
        said.json()
    }

    /// Its answer as JSON lines.
    ///
    /// # Errors
    ///
    /// It did not end well, or did not print JSON.
    pub async fn json_lines(&self, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        let text = self.ok(args.iter().copied().chain(["-o", "json"])).await?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// Applies resources, given as text.
    ///
    /// # Errors
    ///
    /// It cannot be run; whether it ended well is in what it said.
    pub async fn apply(&self, resources: &str) -> anyhow::Result<Said> {
        let file = tempfile::Builder::new().prefix("weft-").suffix(".yaml").tempfile()?;
        std::fs::write(file.path(), resources)?;
        self.run([OsStr::new("apply"), OsStr::new("-f"), file.path().as_os_str()]).await
    }
}

/// A program, in an environment without settings of another mesh: what leads it is on its command line.
pub fn program(path: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEFT_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a program to its end.
///
/// # Errors
///
/// It cannot be run, or does not end in time.
pub async fn run(mut command: Command) -> anyhow::Result<Said> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let standard = command.as_std();
    let name = Path::new(standard.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let args: Vec<_> = standard.get_args().map(OsStr::to_string_lossy).collect();
    let line = format!("{name} {}", args.join(" "));
    let output = timeout(COMMAND_LIMIT, command.output())
        .await
        .with_context(|| format!("`{line}` did not end within {} s", COMMAND_LIMIT.as_secs()))?;
    let Output { status, stdout, stderr } = output.with_context(|| format!("`{line}` could not be run"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Said { line, status: status.code(), stdout: text(stdout), stderr: text(stderr) })
}

impl Said {
    /// Its answer, if that is JSON.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON: {self}"))
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status.map_or_else(|| "a signal".to_owned(), |status| format!("status {status}"));
        write!(f, "`{}` ended with {status}: {}{}", self.line, self.stderr, self.stdout)
    }
}
