//! `weft-proxy redirect`: the kernel's part of the transparent way in, as rules of nftables.
//!
//! All of it is one table of our own, `inet weft`. Nobody else's rules are read or changed, and removing the table removes all. A
//! rule set is installed by one transaction that replaces the table whole: it is there as it should be or as it was, never in part, and
//! installing twice is installing once.
//!
//! What is redirected is what this machine's (or network namespace's) programs open by TCP, but for
//! - what the sidecar itself opens, told by the user or group that it runs as: redirected, it would come back to itself;
//! - what stays on this machine, except for the loopback addresses of services;
//! - what the operator excludes.
//!
//! Needs `nft` and the right to administer the network (CAP_NET_ADMIN). The sidecar needs neither.

use ipnet::IpNet;
use nix::unistd::{Group, User};
use std::ffi::OsStr;
use std::fmt::{Display, Write as _};
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::str::FromStr;

/// Our table. The name is part of the surface: it is how people find it.
const TABLE: &str = "inet weft";

/// Where services' loopback addresses lie.
const SERVICES: &str = "127.64.0.0/10";

/// Before the usual place of destination NAT (-100), so that others' rules there see what is left.
const PRIORITY: i32 = -110;

/// Where nft is, beside the PATH: that of a plain user often lacks the administrator's folders.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// `weft-proxy redirect`.
#[derive(Debug, clap::Args)]
pub struct Redirect {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Lead connections that programs open to the sidecar; replaces what was installed before
    Install(Box<Install>),
    /// Take the rules away; nothing happens if there are none
    Remove,
    /// Show the rules that are installed
    Show,
}

/// What is redirected, and where to.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Install {
    /// The port of the sidecar's --redirect-listen
    #[arg(long, value_name = "PORT", default_value_t = 15_002, value_parser = clap::value_parser!(u16).range(1..))]
    proxy_port: u16,
    /// The user that the sidecar runs as, by name or number: what it opens is not redirected; may be given several times
    #[arg(long = "uid", value_name = "USER", value_delimiter = ',', required_unless_present_any = ["gids", "only_uids"])]
    uids: Vec<Uid>,
    /// The group that the sidecar runs as, for sidecars that share their user with the app; may be given several times
    #[arg(long = "gid", value_name = "GROUP", value_delimiter = ',')]
    gids: Vec<Gid>,
    /// Redirect only what these users open; may be given several times
    #[arg(long = "only-uid", value_name = "USER", value_delimiter = ',')]
    only_uids: Vec<Uid>,
    /// Leave these destinations alone; may be given several times
    #[arg(long = "exclude", value_name = "IP[/BITS]", value_delimiter = ',')]
    excluded: Vec<Destination>,
    /// Leave these destination ports alone; may be given several times
    #[arg(long = "exclude-port", value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    excluded_ports: Vec<u16>,
    /// The port of the sidecar's --dns-listen: DNS queries, to whichever nameserver, are led there as well. The nameserver that the
    /// sidecar itself asks must not be one on this machine
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    dns_port: Option<u16>,
    /// Leave IPv6 alone; otherwise --redirect-listen needs an address of each family
    #[arg(long)]
    no_ipv6: bool,
    /// Print the rules instead of installing them
    #[arg(long)]
    print: bool,
}

/// A user, found by name or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Uid(u32);

/// A group, found by name or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gid(u32);

/// Addresses that are left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Destination(IpNet);

/// Rules cannot be installed, removed or shown.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// There is no nft.
    #[error("nft is not installed; install nftables (`apt-get install nftables`, `dnf install nftables`)")]
    NoNft,
    /// nft cannot be run.
    #[error("nft cannot be run")]
    Run(#[source] io::Error),
    /// nft refused.
    #[error("nft refused ({status}): {said}{}", hint(said))]
    Refused {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
}

fn hint(said: &str) -> &'static str {
    if said.contains("not permitted") {
        "; it needs root, or CAP_NET_ADMIN in this network namespace"
    } else {
        ""
    }
}

impl Redirect {
    /// Does it. What is to be printed is returned.
    ///
    /// # Errors
    /// If nft is missing or refuses; then nothing was changed.
    pub fn run(self) -> Result<String, RedirectError> {
        match self.action {
            Action::Install(install) if install.print => Ok(install.rules()),
            Action::Install(install) => nft(&["-f", "-"], &install.rules()).map(|_| String::new()),
            Action::Remove => nft(&["-f", "-"], &without()).map(|_| String::new()),
            Action::Show => show(),
        }
    }
}

/// The table's end. It is declared first, so that there is one to delete.
fn without() -> String {
    format!("table {TABLE}\ndelete table {TABLE}\n")
}

fn show() -> Result<String, RedirectError> {
    let listed = nft(&["list", "tables"], "")?;
    if listed.lines().any(|line| line.trim() == format!("table {TABLE}")) {
        nft(&["list", "table", "inet", "weft"], "")
    } else {
        Ok(String::from("no rules are installed; `weft-proxy redirect install` installs them\n"))
    }
}

impl Install {
    /// The whole transaction.
    fn rules(&self) -> String {
        let mut rules = without();
        // Writing into a string does not fail.
        let _ = writeln!(rules, "table {TABLE} {{\n  comment \"weft-proxy redirect\"\n  chain output {{");
        for line in self.chain() {
            let _ = writeln!(rules, "    {line}");
        }
        rules.push_str("  }\n}\n");
        rules
    }

    fn chain(&self) -> Vec<String> {
        let mut chain = vec![format!("type nat hook output priority {PRIORITY}; policy accept;")];
        // The sidecar's own, before everything else.
        chain.extend(set(&self.uids).map(|uids| format!("meta skuid {uids} accept")));
        chain.extend(set(&self.gids).map(|gids| format!("meta skgid {gids} accept")));
        chain.extend(set(&self.only_uids).map(|uids| format!("meta skuid != {uids} accept")));
        if self.no_ipv6 {
            chain.push("meta nfproto ipv6 accept".into());
        }
        if let Some(port) = self.dns_port {
            chain.push(format!("meta l4proto {{ tcp, udp }} th dport 53 redirect to :{port}"));
        }
        chain.push("meta l4proto != tcp accept".into());
        chain.push(format!("ip daddr {SERVICES} tcp dport 1-65535 redirect to :{}", self.proxy_port));
        chain.push("fib daddr type local accept".into());
        for Destination(net) in &self.excluded {
            let family = if matches!(net, IpNet::V4(_)) { "ip" } else { "ip6" };
            chain.push(format!("{family} daddr {net} accept"));
        }
        chain.extend(set(&self.excluded_ports).map(|ports| format!("tcp dport {ports} accept")));
        chain.push(format!("tcp dport 1-65535 redirect to :{}", self.proxy_port));
        chain
    }
}

/// An anonymous set, none if it would be empty.
fn set<T: Display>(items: &[T]) -> Option<String> {
    let items: Vec<_> = items.iter().map(T::to_string).collect();
    (!items.is_empty()).then(|| format!("{{ {} }}", items.join(", ")))
}

impl Display for Uid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Display for Gid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Uid {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if let Ok(number) = s.parse() {
            return Ok(Self(number));
        }
        let user = User::from_name(s).map_err(|error| format!("users cannot be looked up: {error}"))?;
        user.map(|user| Self(user.uid.as_raw()))
            .ok_or_else(|| "there is no such user; give a name or a number".into())
    }
}

impl FromStr for Gid {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if let Ok(number) = s.parse() {
            return Ok(Self(number));
        }
        let group = Group::from_name(s).map_err(|error| format!("groups cannot be looked up: {error}"))?;
        group
            .map(|group| Self(group.gid.as_raw()))
            .ok_or_else(|| "there is no such group; give a name or a number".into())
    }
}

impl FromStr for Destination {
    type Err = &'static str;

    fn from_str(s: &str) -> Result<Self, &'static str> {
        let one = || s.parse::<IpAddr>().map(IpNet::from);
        let net: IpNet =
            s.parse().or_else(|_| one().map_err(|_| "no address or range, such as 10.0.0.0/8"))?;
        Ok(Self(net.trunc()))
    }
}

/// Runs nft and returns what it printed.
fn nft(args: &[&str], input: &str) -> Result<String, RedirectError> {
    let Output { status, stdout, stderr } = run("nft".as_ref(), args, input)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if status.success() {
        Ok(text(&stdout))
    } else {
        Err(RedirectError::Refused { status, said: text(&stderr).trim().to_owned() })
    }
}

fn run(program: &OsStr, args: &[&str], input: &str) -> Result<Output, RedirectError> {
    let command = |program: &OsStr| {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let mut spawned = command(program);
    for folder in FOLDERS {
        match spawned {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                spawned = command(format!("{folder}/nft").as_ref());
            }
            _ => break,
        }
    }
    let mut child = spawned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => RedirectError::NoNft,
        _ => RedirectError::Run(error),
    })?;
    if let Some(mut pipe) = child.stdin.take() {
        // If it ends before it read all, how it ended says more.
        let _ = pipe.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(RedirectError::Run)
}

#[cfg(test)]
mod tests {
    use crate::cli::{Command, Invocation};

    fn printed(flags: &[&str]) -> Result<String, String> {
        let line = ["weft-proxy", "redirect", "install", "--print"].iter().chain(flags);
        match Invocation::try_parse_from(line).map_err(|error| error.to_string())? {
            Invocation::Command(Command::Redirect(redirect)) => {
                redirect.run().map_err(|error| error.to_string())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_rules_are_one_table_that_replaces_itself() {
        let rules = printed(&["--uid=10001"]).unwrap();
        let expected = "\
table inet weft
delete table inet weft
table inet weft {
  comment \"weft-proxy redirect\"
  chain output {
    type nat hook output priority -110; policy accept;
    meta skuid { 10001 } accept
    meta l4proto != tcp accept
    ip daddr 127.64.0.0/10 tcp dport 1-65535 redirect to :15002
    fib daddr type local accept
    tcp dport 1-65535 redirect to :15002
  }
}
";
        assert_eq!(rules, expected);
    }

    #[test]
    fn what_is_left_alone_comes_before_what_is_redirected() {
        let flags = [
            "--gid=7,8",
            "--only-uid=65534",
            "--exclude=10.1.2.3/8,2001:db8::1",
            "--exclude-port=22",
            "--dns-port=15053",
            "--no-ipv6",
            "--proxy-port=9",
        ];
        let rules = printed(&flags).unwrap();
        let lines: Vec<_> = rules.lines().map(str::trim).skip(5).collect();
        let expected = [
            "type nat hook output priority -110; policy accept;",
            "meta skgid { 7, 8 } accept",
            "meta skuid != { 65534 } accept",
            "meta nfproto ipv6 accept",
            "meta l4proto { tcp, udp } th dport 53 redirect to :15053",
            "meta l4proto != tcp accept",
            "ip daddr 127.64.0.0/10 tcp dport 1-65535 redirect to :9",
            "fib daddr type local accept",
            "ip daddr 10.0.0.0/8 accept",
            "ip6 daddr 2001:db8::1/128 accept",
            "tcp dport { 22 } accept",
            "tcp dport 1-65535 redirect to :9",
            "}",
            "}",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn mistakes_are_told_before_anything_is_installed() {
        for (flags, says) in [
            (vec![], "--uid"),
            (vec!["--uid=no-such-user-here"], "there is no such user"),
            (vec!["--uid=1", "--exclude=10.0.0.0/8; flush ruleset"], "no address or range"),
            (vec!["--uid=1", "--proxy-port=0"], "--proxy-port"),
        ] {
            let error = printed(&flags).unwrap_err();
            assert!(error.contains(says), "{flags:?}: {error}");
        }
    }
}
