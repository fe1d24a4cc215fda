//! Installing the PostgreSQL server with the system's package manager.
//!
//! Only what a person would type, run only where it needs no password, and said before it runs. The package's own
//! default cluster is neither used nor, where the package manager can be told so, created.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use crate::Say;
use crate::binaries::{Binaries, FindError, MIN_MAJOR};

/// A package manager and how it installs the server.
struct Manager {
    program: &'static str,
    /// What is shown, and what a person would type.
    command: &'static str,
    /// Run by `sh -e` around `command`, when more than the command is needed.
    script: Option<&'static str>,
}

/// Debian's package creates and starts a cluster "main" on port 5432, which nobody here asked for; its own configuration
/// can say no, and is put back as it was afterwards.
const APT_SCRIPT: &str = r#"
conf=/etc/postgresql-common/createcluster.d/weft-no-main-cluster.conf
mkdir -p "${conf%/*}"
trap 'rm -f "$conf"' EXIT
echo "create_main_cluster = false" > "$conf"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends postgresql
"#;

const MANAGERS: &[Manager] = &[
    Manager {
        program: "apt-get",
        command: "apt-get update && apt-get install -y --no-install-recommends postgresql",
        script: Some(APT_SCRIPT),
    },
    Manager { program: "dnf", command: "dnf install -y postgresql-server", script: None },
    Manager { program: "apk", command: "apk add postgresql", script: None },
    Manager { program: "pacman", command: "pacman -Sy --noconfirm --needed postgresql", script: None },
    Manager {
        program: "zypper",
        command: "zypper --non-interactive install postgresql-server",
        script: None,
    },
];

/// PostgreSQL is absent and could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// No package manager that is known here.
    #[error(
        "PostgreSQL {MIN_MAJOR} or newer is needed and this system's package manager is not known; \
         install the PostgreSQL server and put its `bin` folder in PATH, or set WEFT_DATABASE_URL"
    )]
    UnknownSystem(#[source] FindError),
    /// Installing needs rights that this user does not have without a password.
    #[error(
        "PostgreSQL {MIN_MAJOR} or newer is needed; install it with `sudo sh -c '{command}'`, or set WEFT_DATABASE_URL"
    )]
    NotAllowed {
        /// What to run as root.
        command: &'static str,
        #[source]
        /// What was searched.
        absent: FindError,
    },
    /// The package manager could not be run.
    #[error("running `{command}` failed; run it by hand, or set WEFT_DATABASE_URL")]
    Run {
        /// What was run.
        command: &'static str,
        /// Why it did not run.
        source: std::io::Error,
    },
    /// The package manager failed; it has printed why.
    #[error(
        "`{command}` ended with {status}; see its output above, then run it by hand, or set WEFT_DATABASE_URL"
    )]
    Failed {
        /// What was run.
        command: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
    /// The package is installed, and still there is no usable server.
    #[error(
        "`{command}` succeeded, but brought no PostgreSQL server of version {MIN_MAJOR} or newer; see https://www.postgresql.org/download/"
    )]
    StillAbsent {
        /// What was run.
        command: &'static str,
        #[source]
        /// What was searched.
        absent: FindError,
    },
}

/// Installs a server and finds it.
pub(crate) fn install(absent: FindError, say: Say<'_>) -> Result<Binaries, InstallError> {
    let Some(manager) = MANAGERS.iter().find(|manager| in_system_path(manager.program)) else {
        return Err(InstallError::UnknownSystem(absent));
    };
    let command = manager.command;
    let Some(mut shell) = root_shell() else {
        return Err(InstallError::NotAllowed { command, absent });
    };

    say(&format!(
        "PostgreSQL {MIN_MAJOR} or newer is not on this machine; installing it now, as root: {command}"
    ));
    // The package manager talks on our stderr, so that our stdout stays for what the caller prints there.
    let status = shell
        .args(["-e", "-c", &format!("exec 1>&2; {}", manager.script.unwrap_or(command))])
        .status()
        .map_err(|source| InstallError::Run { command, source })?;
    if !status.success() {
        return Err(InstallError::Failed { command, status });
    }

    let binaries = Binaries::find().map_err(|absent| InstallError::StillAbsent { command, absent })?;
    say(&format!("PostgreSQL {} is installed in {}", binaries.major(), binaries.dir().display()));
    Ok(binaries)
}

/// A shell that runs as root and reads nothing; none if that takes a password.
#[must_use]
pub fn root_shell() -> Option<Command> {
    let mut shell = if nix::unistd::geteuid().is_root() {
        Command::new("sh")
    } else {
        let mut sudo = sudo_needs_no_password().then(|| Command::new("sudo"))?;
        sudo.args(["-n", "sh"]);
        sudo
    };
    shell.stdin(Stdio::null());
    Some(shell)
}

fn in_system_path(program: &str) -> bool {
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(program).is_file())
}

fn sudo_needs_no_password() -> bool {
    Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
