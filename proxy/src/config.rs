//! What the sidecar is told at its start: flags and their environment variables, parsed once into plain values.
//! Nothing else reads the environment. Every mistake is an error that names the flag.

use clap::{Args as ClapArgs, Parser, ValueEnum};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use weft_client::ControllerAddress;
use weft_identity::token::JoinToken;
use weft_model::membership::{self, UPSTREAMS_MAX};
use weft_model::{InstanceId, Port, ServiceName};

/// Most data-plane threads; more than any machine that a sidecar shares with its app gives it.
const THREADS_MAX: usize = 256;

/// Tunnels kept by default, in each direction. Each holds some 4 KiB and a file descriptor.
const TUNNELS_IDLE: usize = 1024;

/// Join tokens are 153 bytes; what is far larger is another file.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;

/// The command line of `weft-proxy`.
#[derive(Debug, Parser)]
#[command(
    name = "weft-proxy",
    version,
    about = "The Weft sidecar: forwards TCP over mTLS for one workload instance"
)]
pub struct Cli {
    #[command(flatten)]
    args: Args,
    /// How the sidecar's own log, on stderr, is written
    #[arg(long, env = "WEFT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What becomes of redirected connections to what is not in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Outside {
    /// They go there, as plain TCP, with a record.
    Allow,
    /// They are refused, with a record.
    Refuse,
}

impl Outside {
    /// As records name it: the setting that decided.
    pub(crate) fn rule(self) -> String {
        let word = match self {
            Self::Allow => "allow",
            Self::Refuse => "refuse",
        };
        format!("--outside {word}")
    }
}

#[derive(Debug, ClapArgs)]
struct Args {
    /// A controller's address; may be given several times
    #[arg(
        long = "controller",
        env = "WEFT_CONTROLLER",
        value_name = "HOST:PORT",
        required = true,
        value_delimiter = ','
    )]
    controllers: Vec<ControllerAddress>,
    /// Which instance this sidecar stands before
    #[arg(long, env = "WEFT_INSTANCE", value_name = "NS/SERVICE/INSTANCE")]
    instance: InstanceId,
    /// A file with the join token; needed only until there is an identity in the state directory
    #[arg(long, env = "WEFT_JOIN_TOKEN_FILE", value_name = "PATH")]
    join_token_file: Option<PathBuf>,
    /// The join token itself; better from the environment, since everybody on the machine can read a command line
    #[arg(long, env = "WEFT_JOIN_TOKEN", value_name = "TOKEN", hide = true, hide_env_values = true)]
    join_token: Option<String>,
    /// Where identity and snapshot are kept; of this instance alone
    #[arg(long, env = "WEFT_STATE_DIR", value_name = "DIR")]
    state_dir: PathBuf,
    /// Where other sidecars connect to; port 0 picks a free one
    #[arg(long, env = "WEFT_INBOUND_LISTEN", value_name = "IP:PORT", default_value = "0.0.0.0:15001")]
    inbound_listen: SocketAddr,
    /// The address that other sidecars are told, if it is not the one listened on
    #[arg(long, env = "WEFT_ADVERTISE", value_name = "IP:PORT")]
    advertise: Option<SocketAddr>,
    /// What the mesh is to remember of this instance; may be given several times. `region` and `zone` say where it runs, and traffic
    /// policies may prefer what is near
    #[arg(long, env = "WEFT_METADATA", value_name = "KEY=VALUE", value_delimiter = ',')]
    metadata: Vec<Metadata>,
    /// Where the local app serves a port of the service; may be given several times
    #[arg(long = "app", env = "WEFT_APP", value_name = "PORT=IP:PORT", value_delimiter = ',')]
    apps: Vec<App>,
    /// Tell the app who connects: each connection to it begins with a PROXY protocol header, version 2, with the client's address and,
    /// in field 0xD0, its SPIFFE id
    #[arg(long, env = "WEFT_PROXY_PROTOCOL")]
    proxy_protocol: bool,
    /// A service and port to connect to, optionally with a local address for it; may be given several times
    #[arg(
        long = "upstream",
        env = "WEFT_UPSTREAM",
        value_name = "NS/SERVICE:PORT[=IP:PORT]",
        value_delimiter = ','
    )]
    upstreams: Vec<Upstream>,
    /// A service and port that the app may come to need, with a local address for it: it becomes an upstream when the app first
    /// connects there; may be given several times
    #[arg(
        long = "upstream-on-demand",
        env = "WEFT_UPSTREAM_ON_DEMAND",
        value_name = "NS/SERVICE:PORT=IP:PORT",
        value_delimiter = ','
    )]
    on_demand: Vec<Upstream>,
    /// Allow this sidecar to reach every service of the mesh
    #[arg(long, env = "WEFT_ALL_UPSTREAMS")]
    all_upstreams: bool,
    /// Listen on the stable loopback address of every upstream service, on each of its ports
    #[arg(long, env = "WEFT_LOOPBACK_ADDRESSES")]
    loopback_addresses: bool,
    /// Answer DNS queries here, over UDP and TCP: <service>.<namespace>.weft with the service's loopback address, all else as the machine's
    /// nameservers answer it
    #[arg(long, env = "WEFT_DNS_LISTEN", value_name = "IP:PORT")]
    dns_listen: Option<SocketAddr>,
    /// A nameserver that answers what is not in the mesh; may be given several times [default: those of /etc/resolv.conf]
    #[arg(long = "dns-upstream", env = "WEFT_DNS_UPSTREAM", value_name = "IP[:PORT]", value_delimiter = ',')]
    dns_upstreams: Vec<Nameserver>,
    /// Take connections here that `weft-proxy redirect install` leads to the sidecar; may be given several times, once for IPv4 and once for
    /// IPv6
    #[arg(long, env = "WEFT_REDIRECT_LISTEN", value_name = "IP:PORT", value_delimiter = ',')]
    redirect_listen: Vec<SocketAddr>,
    /// What becomes of redirected connections to what is not in the mesh
    #[arg(long, env = "WEFT_OUTSIDE", value_enum, default_value_t = Outside::Refuse)]
    outside: Outside,
    /// Where /ready, /live, /metrics, /config and /connections are served; a loopback address
    #[arg(long, env = "WEFT_ADMIN_LISTEN", value_name = "IP:PORT", default_value = "127.0.0.1:15000")]
    admin_listen: SocketAddr,
    /// Where connection records go, one JSON object per line; - is stdout
    #[arg(long, env = "WEFT_CONNECTION_LOG", value_name = "PATH", default_value = "-")]
    connection_log: PathBuf,
    /// How often the local app is probed, give or take a tenth
    #[arg(long, env = "WEFT_PROBE_INTERVAL", value_parser = humantime::parse_duration, default_value = "5s")]
    probe_interval: Duration,
    /// How long a probe may take; longer while the sidecar has reason to doubt itself
    #[arg(long, env = "WEFT_PROBE_TIMEOUT", value_parser = humantime::parse_duration, default_value = "1s")]
    probe_timeout: Duration,
    /// Good probes in a row that make the app healthy again; the first one of all counts by itself
    #[arg(long, env = "WEFT_PROBE_RISE", value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    probe_rise: u32,
    /// Bad probes in a row that make the app unhealthy; one refused connection does by itself
    #[arg(long, env = "WEFT_PROBE_FALL", value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    probe_fall: u32,
    /// How long a stop may take before the connections that are left are cut
    #[arg(long, env = "WEFT_DRAIN_DEADLINE", value_parser = humantime::parse_duration, default_value = "10s")]
    drain_deadline: Duration,
    /// Tunnels to other sidecars, and from them, that are kept open between connections, so that the next one needs no handshake; 0 keeps
    /// none
    #[arg(long, env = "WEFT_TUNNELS_IDLE_MAX", value_name = "N", default_value_t = TUNNELS_IDLE)]
    tunnels_idle_max: usize,
    /// Take the place of the sidecar that runs with the same state directory: its listening sockets come over with what waits in them, no
    /// connection is refused, and it drains; if none runs, just start
    #[arg(long)]
    upgrade: bool,
    /// Where a service manager is told that this process is the sidecar now
    #[arg(long, env = "NOTIFY_SOCKET", value_name = "PATH", hide = true)]
    notify_socket: Option<PathBuf>,
    /// Threads that forward connections [default: one per core]
    #[arg(long, env = "WEFT_THREADS", value_name = "N")]
    threads: Option<NonZeroUsize>,
}

/// Where the local app serves a port of the service: `PORT=IP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct App {
    port: Port,
    address: SocketAddr,
}

/// Something that is remembered of an instance: `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Metadata {
    key: String,
    value: String,
}

impl FromStr for Metadata {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, ConfigError> {
        let form = || ConfigError::Form { value: s.into(), form: "KEY=VALUE" };
        let (key, value) = s.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(form)?;
        Ok(Self { key: key.into(), value: value.into() })
    }
}

/// A nameserver: `IP[:PORT]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Nameserver(SocketAddr);

/// A port of a service that the local app connects to: `NS/SERVICE:PORT[=IP:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// The service.
    pub service: ServiceName,
    /// Its port.
    pub port: Port,
    /// A local address that leads there.
    pub listen: Option<SocketAddr>,
}

/// A value of the command line is malformed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value does not have the form that it should have.
    #[error("{value:?} is not {form}")]
    Form {
        /// What was given.
        value: String,
        /// What it should be.
        form: &'static str,
    },
    /// A flag's value contradicts another one.
    #[error("--{flag}: {rule}")]
    Rule {
        /// The flag.
        flag: &'static str,
        /// What it must be.
        rule: String,
    },
    /// The file with the join token cannot be read.
    #[error("cannot read the join token from {path}")]
    TokenFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The join token is malformed.
    #[error("the join token cannot be used")]
    Token(#[source] weft_identity::token::TokenError),
}

/// How the local app is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// From the start of one probe to the start of the next.
    pub interval: Duration,
    /// How long one may take.
    pub timeout: Duration,
    /// Good ones in a row that make the app healthy again; at least 1.
    pub rise: u32,
    /// Bad ones in a row, other than refused connections, that make it unhealthy; at least 1.
    pub fall: u32,
}

/// Where connection records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionLog {
    /// To standard output.
    Stdout,
    /// To the end of this file.
    File(PathBuf),
}

/// Everything that a sidecar is told at its start, validated.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where controllers are; at least one.
    pub controllers: Vec<ControllerAddress>,
    /// Which instance the sidecar stands before.
    pub instance: InstanceId,
    /// How to get an identity if there is none yet.
    pub join_token: Option<JoinToken>,
    /// Where identity and snapshot are kept.
    pub state_dir: PathBuf,
    /// Where other sidecars connect to. Port 0 picks a free one.
    pub inbound_listen: SocketAddr,
    /// What other sidecars are told; the bound inbound address if none.
    pub advertise: Option<SocketAddr>,
    /// What the mesh is to remember of the instance.
    pub metadata: BTreeMap<String, String>,
    /// Where the local app serves each port of the service.
    pub apps: BTreeMap<Port, SocketAddr>,
    /// Whether connections to the app begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// The services that the app connects to, some with a local address of their own.
    pub upstreams: Vec<Upstream>,
    /// The services that become upstreams when the app first connects to them; each has a local address.
    pub on_demand: Vec<Upstream>,
    /// Whether the app may connect to every service.
    pub all_upstreams: bool,
    /// Whether upstream services' stable loopback addresses are listened on.
    pub loopback_addresses: bool,
    /// Where DNS queries are answered, if they are. Port 0 picks a free one.
    pub dns_listen: Option<SocketAddr>,
    /// The nameservers that answer what is not in the mesh; those of the machine if none.
    pub dns_upstreams: Vec<SocketAddr>,
    /// Where redirected connections are taken: loopback only. Port 0 picks a free one.
    pub redirect_listen: Vec<SocketAddr>,
    /// What becomes of those to what is not in the mesh.
    pub outside: Outside,
    /// Where the admin endpoints are served: loopback only.
    pub admin_listen: SocketAddr,
    /// Where connection records go.
    pub connection_log: ConnectionLog,
    /// How the local app is probed.
    pub probe: Probe,
    /// How long a stop may take before connections are cut.
    pub drain_deadline: Duration,
    /// How many tunnels may wait for their next stream, in each direction.
    pub tunnels_idle_max: usize,
    /// Whether to take the place of the sidecar that runs with the same state directory.
    pub upgrade: bool,
    /// The socket of the service manager, which is told when this process has taken another one's place.
    pub notify_socket: Option<PathBuf>,
    /// How many threads forward connections.
    pub threads: NonZeroUsize,
}

impl Cli {
    /// The configuration that the command line asks for. Reads the join token's file.
    ///
    /// # Errors
    /// If a value is malformed or contradicts another.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let Args { apps: app_list, .. } = &self.args;
        let mut apps = BTreeMap::new();
        for App { port, address } in app_list {
            if apps.insert(*port, *address).is_some() {
                return Err(rule("app", format!("port {port} is given twice; leave one")));
            }
        }
        let args = self.args;
        let mut metadata = BTreeMap::new();
        for Metadata { key, value } in args.metadata {
            if metadata.insert(key.clone(), value).is_some() {
                return Err(rule("metadata", format!("{key} is given twice; leave one")));
            }
        }
        let join_token = match (args.join_token, &args.join_token_file) {
            (Some(text), _) => Some(text),
            (None, Some(path)) => Some(read_token(path)?),
            (None, None) => None,
        };
        let join_token = join_token.map(|text| text.parse()).transpose().map_err(ConfigError::Token)?;
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let connection_log = match args.connection_log.to_str() {
            Some("-") => ConnectionLog::Stdout,
            _ => ConnectionLog::File(args.connection_log),
        };
        let config = Config {
            controllers: args.controllers,
            instance: args.instance,
            join_token,
            state_dir: args.state_dir,
            inbound_listen: args.inbound_listen,
            advertise: args.advertise,
            metadata,
            apps,
            upstreams: args.upstreams,
            on_demand: args.on_demand,
            all_upstreams: args.all_upstreams,
            loopback_addresses: args.loopback_addresses,
            dns_listen: args.dns_listen,
            dns_upstreams: args.dns_upstreams.into_iter().map(|Nameserver(address)| address).collect(),
            redirect_listen: args.redirect_listen,
            outside: args.outside,
            admin_listen: args.admin_listen,
            connection_log,
            probe: Probe {
                interval: args.probe_interval,
                timeout: args.probe_timeout,
                rise: args.probe_rise,
                fall: args.probe_fall,
            },
            drain_deadline: args.drain_deadline,
            tunnels_idle_max: args.tunnels_idle_max,
            proxy_protocol: args.proxy_protocol,
            upgrade: args.upgrade,
            notify_socket: args.notify_socket.filter(|path| !path.as_os_str().is_empty()),
            threads: args.threads.unwrap_or(cores),
        };
        config.validate()?;
        Ok(config)
    }
}

impl Config {
    fn validate(&self) -> Result<(), ConfigError> {
        if !self.admin_listen.ip().is_loopback() {
            let address = self.admin_listen;
            return Err(rule(
                "admin-listen",
                format!("{address} is no loopback address, and these pages tell too much; use 127.0.0.1"),
            ));
        }
        if self.advertise.is_none() && self.inbound_listen.ip().is_unspecified() {
            let address = self.inbound_listen;
            return Err(rule(
                "advertise",
                format!("needed, because nobody can connect to {address}; give the address others reach"),
            ));
        }
        if self.advertise.is_some_and(|address| address.port() == 0 || address.ip().is_unspecified()) {
            return Err(rule("advertise", "must be an address and port that others can connect to".into()));
        }
        if self.threads.get() > THREADS_MAX {
            return Err(rule("threads", format!("at most {THREADS_MAX}")));
        }
        if self.probe.interval < Duration::from_millis(10) || self.probe.timeout.is_zero() {
            return Err(rule("probe-interval", "at least 10ms, with a timeout above zero".into()));
        }
        membership::check_metadata(&self.metadata)
            .map_err(|rejection| rule("metadata", rejection.to_string()))?;
        self.validate_on_demand()?;
        self.validate_dns()?;
        if let Some(address) = self.redirect_listen.iter().find(|address| !address.ip().is_loopback()) {
            let why =
                "is no loopback address: whoever reaches it would act as this workload; use 127.0.0.1 or ::1";
            return Err(rule("redirect-listen", format!("{address} {why}")));
        }
        let mut taken = BTreeMap::new();
        let named = self.upstreams.iter().map(|upstream| ("upstream", upstream));
        for (flag, upstream) in named.chain(self.on_demand.iter().map(|it| ("upstream-on-demand", it))) {
            let Some(address) = upstream.listen else { continue };
            if !address.ip().is_loopback() {
                let why =
                    "is no loopback address: whoever reaches it would act as this workload; use 127.0.0.1";
                return Err(rule(flag, format!("{address} {why}")));
            }
            if address.port() == 0 {
                continue;
            }
            if taken.insert(address, upstream).is_some() || address == self.inbound_listen {
                return Err(rule(flag, format!("{address} is used twice; give each its own")));
            }
        }
        Ok(())
    }

    fn validate_dns(&self) -> Result<(), ConfigError> {
        let Some(listen) = self.dns_listen else {
            let unused =
                self.dns_upstreams.first().map(|_| "nobody would ask it; add --dns-listen".to_owned());
            return unused.map_or(Ok(()), |why| Err(rule("dns-upstream", why)));
        };
        if listen.ip().is_unspecified() {
            let why = "is every address of this machine, and names are for its own apps; use 127.0.0.1";
            return Err(rule("dns-listen", format!("{listen} {why}")));
        }
        if !self.loopback_addresses && self.redirect_listen.is_empty() {
            let why = "the addresses that it answers with would lead nowhere; add --loopback-addresses or --redirect-listen";
            return Err(rule("dns-listen", why.into()));
        }
        if self.dns_upstreams.contains(&listen) {
            return Err(rule("dns-upstream", format!("{listen} is this sidecar's own; it would ask itself")));
        }
        Ok(())
    }

    fn validate_on_demand(&self) -> Result<(), ConfigError> {
        const FLAG: &str = "upstream-on-demand";
        for Upstream { service, listen, .. } in &self.on_demand {
            if listen.is_none() {
                let why =
                    "needs a local address, since the service's own is not known before it is an upstream";
                return Err(rule(FLAG, format!("{service} {why}; add =127.0.0.1:PORT")));
            }
            if self.all_upstreams || self.upstreams.iter().any(|upstream| upstream.service == *service) {
                return Err(rule(
                    FLAG,
                    format!("{service} is an upstream from the start; use --upstream for its address"),
                ));
            }
        }
        if self.on_demand.len() + self.upstreams.len() > UPSTREAMS_MAX {
            return Err(rule(FLAG, format!("at most {UPSTREAMS_MAX} upstreams, the others counted in")));
        }
        Ok(())
    }
}

impl FromStr for App {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, ConfigError> {
        let error = || form(s, "PORT=IP:PORT, such as 5432=127.0.0.1:5433");
        let (port, address) = s.split_once('=').ok_or_else(error)?;
        Ok(Self { port: port.parse().map_err(|_| error())?, address: address.parse().map_err(|_| error())? })
    }
}

impl FromStr for Nameserver {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, ConfigError> {
        const PORT: u16 = 53;
        let with_port = s.parse().or_else(|_| s.parse().map(|ip: IpAddr| SocketAddr::new(ip, PORT)));
        with_port.map(Self).map_err(|_| form(s, "IP or IP:PORT, such as 192.0.2.53 or 192.0.2.53:5353"))
    }
}

impl FromStr for Upstream {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, ConfigError> {
        let error =
            || form(s, "NS/SERVICE:PORT or NS/SERVICE:PORT=IP:PORT, such as default/db:5432=127.0.0.1:5432");
        let (target, listen) = match s.split_once('=') {
            Some((target, listen)) => (target, Some(listen.parse().map_err(|_| error())?)),
            None => (s, None),
        };
        let (service, port) = target.rsplit_once(':').ok_or_else(error)?;
        Ok(Self {
            service: ServiceName::parse_lenient(service).map_err(|_| error())?,
            port: port.parse().map_err(|_| error())?,
            listen,
        })
    }
}

fn form(value: &str, form: &'static str) -> ConfigError {
    ConfigError::Form { value: value.chars().take(80).collect(), form }
}

const fn rule(flag: &'static str, rule: String) -> ConfigError {
    ConfigError::Rule { flag, rule }
}

fn read_token(path: &PathBuf) -> Result<String, ConfigError> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|source| ConfigError::TokenFile { path: path.clone(), source })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &[&str]) -> Result<Config, String> {
        let base =
            ["weft-proxy", "--controller=127.0.0.1:7400", "--instance=default/web/web-1", "--state-dir=/x"];
        let cli = Cli::try_parse_from(base.iter().chain(extra)).map_err(|error| error.to_string())?;
        cli.into_config().map_err(|error| error.to_string())
    }

    #[test]
    fn flags_become_plain_values() {
        let config = parse(&[
            "--inbound-listen=127.0.0.1:0",
            "--app=8080=127.0.0.1:9000",
            "--upstream=default/db:5432=127.0.0.1:5000",
            "--upstream=api:8080",
            "--drain-deadline=500ms",
        ])
        .unwrap();
        assert_eq!(config.apps[&Port::new(8080).unwrap()].port(), 9000);
        assert_eq!(config.upstreams[0].listen.unwrap().port(), 5000);
        assert_eq!(config.upstreams[1].service.to_string(), "default/api");
        assert_eq!(config.drain_deadline, Duration::from_millis(500));
    }

    #[test]
    fn mistakes_name_the_flag() {
        let local = "--inbound-listen=127.0.0.1:0";
        for (flags, says) in [
            (vec![local, "--admin-listen=0.0.0.0:1"], "--admin-listen"),
            (vec!["--inbound-listen=0.0.0.0:1"], "--advertise"),
            (vec![local, "--app=80=127.0.0.1:1", "--app=80=127.0.0.1:2"], "--app"),
            (vec![local, "--app=80"], "--app"),
            (vec![local, "--upstream=db"], "--upstream"),
            (vec![local, "--upstream=a:1=127.0.0.1:5", "--upstream=b:1=127.0.0.1:5"], "--upstream"),
            (vec![local, "--upstream=a:1=0.0.0.0:5"], "--upstream"),
            (vec![local, "--upstream-on-demand=a:1"], "--upstream-on-demand"),
            (vec![local, "--upstream-on-demand=a:1=10.0.0.1:5"], "--upstream-on-demand"),
            (vec![local, "--upstream=a:1", "--upstream-on-demand=a:2=127.0.0.1:5"], "--upstream-on-demand"),
            (vec![local, "--all-upstreams", "--upstream-on-demand=a:2=127.0.0.1:5"], "--upstream-on-demand"),
            (vec![local, "--upstream=a:1=127.0.0.1:5", "--upstream-on-demand=b:1=127.0.0.1:5"], "twice"),
            (vec![local, "--dns-listen=127.0.0.1:53"], "--loopback-addresses"),
            (vec![local, "--loopback-addresses", "--dns-listen=0.0.0.0:53"], "--dns-listen"),
            (vec![local, "--redirect-listen=0.0.0.0:15002"], "--redirect-listen"),
            (vec![local, "--outside=maybe"], "--outside"),
            (vec![local, "--dns-upstream=192.0.2.1"], "--dns-listen"),
            (vec![local, "--dns-upstream=ns.example.org"], "--dns-upstream"),
            (
                vec![local, "--loopback-addresses", "--dns-listen=127.0.0.1:53", "--dns-upstream=127.0.0.1"],
                "--dns-upstream",
            ),
            (vec![local, "--probe-rise=0"], "--probe-rise"),
            (vec![local, "--join-token-file=/nonexistent"], "/nonexistent"),
        ] {
            let error = parse(&flags).unwrap_err();
            assert!(error.contains(says), "{flags:?}: {error}");
        }
    }
}
