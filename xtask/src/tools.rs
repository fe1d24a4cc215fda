//! Programs of the system that tests run, installed if they are absent, as PostgreSQL is: only what a person would type, only where it
//! needs no password, and said before it runs.

use std::path::Path;

use anyhow::ensure;

use crate::cargo::run;
use crate::say;

/// Programs, and the packages of Debian, Fedora, Alpine, Arch and SUSE that have them, which all name them alike.
const TOOLS: [(&str, &str); 3] = [("nft", "nftables"), ("ip", "iproute2"), ("curl", "curl")];

/// Servers and clients that the story of real protocols runs, and Debian's packages that have them: those without a service that would start by
/// itself. Debian's checker of Redis's files is Redis's server too.
const SERVERS: [(&str, &str, &str); 7] = [
    ("mariadbd", "mariadb-server-core", "MariaDB"),
    ("mariadb", "mariadb-client-core", "MariaDB"),
    ("redis-cli", "redis-tools", "Redis"),
    ("aiosmtpd", "python3-aiosmtpd", "SMTP"),
    ("python3", "python3", "HTTP"),
    ("nghttpd", "nghttp2-server", "HTTP"),
    ("h2load", "nghttp2-client", "HTTP"),
];

/// Folders beside the PATH, which a plain user's often lacks.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How packages are installed; the first of these that there is.
const MANAGERS: [(&str, &str); 5] = [
    (
        "apt-get",
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends",
    ),
    ("dnf", "dnf install -y"),
    ("apk", "apk add"),
    ("pacman", "pacman -Sy --noconfirm --needed"),
    ("zypper", "zypper --non-interactive install"),
];

/// Sees to it that the tests of the network find what they run.
pub(crate) fn provide() -> anyhow::Result<()> {
    let absent: Vec<_> = TOOLS.iter().filter(|(program, _)| !there(program)).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let programs = absent.iter().map(|(program, _)| *program).collect::<Vec<_>>().join(", ");
    let packages = absent.iter().map(|(_, package)| *package).collect::<Vec<_>>().join(" ");
    let manager = MANAGERS.iter().find(|(program, _)| there(program));
    let command = manager.map(|(_, install)| format!("{install} {packages}"));
    let Some(command) = command else {
        anyhow::bail!("tests need {programs}; install the packages {packages}")
    };
    let Some(mut shell) = weft_pgserver::root_shell() else {
        anyhow::bail!("tests need {programs}; install them with `sudo sh -c '{command}'`")
    };
    say(&format!("tests need {programs}; installing now, as root: {command}"));
    let status = run(shell.args(["-e", "-c", &format!("exec 1>&2; {command}")]))?;
    ensure!(status.success(), "`{command}` ended with {status}; see its output above, then run it by hand");
    Ok(())
}

/// Installs servers that are absent, where that can be done. The story goes without those that are not there, and here it is said which.
pub(crate) fn provide_servers() {
    let absent = || SERVERS.iter().filter(|(program, ..)| !there(program)).collect::<Vec<_>>();
    let packages = absent().iter().map(|(_, package, _)| *package).collect::<Vec<_>>().join(" ");
    if !packages.is_empty()
        && let Some((_, install)) =
            MANAGERS.iter().find(|(program, _)| *program == "apt-get" && there(program))
        && let Some(mut shell) = weft_pgserver::root_shell()
    {
        let command = format!("{install} {packages}");
        say(&format!("the story of real protocols runs servers; installing now, as root: {command}"));
        if !run(shell.args(["-e", "-c", &format!("exec 1>&2; {command}")]))
            .is_ok_and(|status| status.success())
        {
            say(&format!("`{command}` failed; see its output above"));
        }
    }
    for (program, package, protocol) in absent() {
        say(&format!(
            "LEFT OUT: {protocol} through two sidecars, since `{program}` is absent (Debian: {package})"
        ));
    }
}

fn there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(FOLDERS.iter().map(|folder| Path::new(folder).to_owned()));
    folders.into_iter().any(|folder| folder.join(program).is_file())
}
