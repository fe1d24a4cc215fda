//! What the process is told, parsed once.

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use weft_identity::spiffe::Role;
use weft_model::{Name, TrustDomain};

/// The Weft control plane: records what happens to the mesh in PostgreSQL and tells every sidecar what to run.
#[derive(Parser)]
#[command(
    name = "weft-controller",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// One-shot commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Credentials of people and tools that use the API.
    #[command(subcommand)]
    Operator(OperatorCommand),
}

/// Commands about operators.
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Issue a credential, on the machine that holds the certificate authority.
    Issue(OperatorIssue),
}

/// A credential for an operator.
#[derive(Debug, Args)]
pub struct OperatorIssue {
    /// The controller's state directory, with the certificate authority in it.
    #[arg(long, env = "WEFT_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Who it is for; the log shows the name with everything that it is used for.
    #[arg(long)]
    pub name: Name,
    /// What it may do.
    #[arg(long, value_parser = role)]
    pub role: Role,
    /// Where to put it.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How long it is valid, at most 30 days.
    #[arg(long, default_value = "30d", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

/// How the controller runs.
#[derive(Args)]
pub struct RunArgs {
    /// The database: postgres://user:password@host:port/database.
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// A file that holds the database's URL, so that no process list shows its password.
    #[arg(long, env = "WEFT_DATABASE_URL_FILE", value_name = "PATH", conflicts_with = "database_url")]
    pub database_url_file: Option<PathBuf>,
    /// Where sidecars and operators connect.
    #[arg(long, env = "WEFT_LISTEN", default_value = "127.0.0.1:7400", value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Where /live, /ready and /metrics are; a loopback address, since nobody is asked for a certificate there.
    #[arg(long, env = "WEFT_ADMIN_LISTEN", default_value = "127.0.0.1:7401", value_name = "IP:PORT")]
    pub admin_listen: SocketAddr,
    /// Where the certificate authority and the admin credential are kept.
    #[arg(long, env = "WEFT_STATE_DIR", default_value = ".weft/controller", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The name that all identities of the mesh start with.
    #[arg(long, env = "WEFT_TRUST_DOMAIN", default_value = "weft.local")]
    pub trust_domain: TrustDomain,
    /// This controller's name.
    #[arg(long, env = "WEFT_NAME", default_value = "controller-1")]
    pub name: Name,
    /// How log lines look.
    #[arg(long, env = "WEFT_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Accept a database that may lose acknowledged events in a crash. For throw-away data only.
    #[arg(long, env = "WEFT_ALLOW_UNSAFE_DATABASE")]
    pub allow_unsafe_database: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object per line.
    Json,
}

/// A checked configuration. Not `Debug`: the URL holds a password.
#[derive(Clone)]
pub struct Config {
    /// The database. Holds a password: never log it.
    pub database_url: String,
    /// Where sidecars and operators connect; port 0 for any.
    pub listen: SocketAddr,
    /// Where /live, /ready and /metrics are; port 0 for any.
    pub admin_listen: SocketAddr,
    /// Where the certificate authority and the admin credential are kept.
    pub state_dir: PathBuf,
    /// The name that all identities of the mesh start with.
    pub trust_domain: TrustDomain,
    /// This controller's name.
    pub name: Name,
    /// Accept a database that may lose acknowledged events in a crash.
    pub allow_unsafe_database: bool,
}

impl TryFrom<RunArgs> for Config {
    type Error = anyhow::Error;

    fn try_from(args: RunArgs) -> anyhow::Result<Self> {
        let database_url = match (args.database_url, args.database_url_file) {
            (Some(url), _) => url,
            (None, Some(path)) => {
                let text = std::fs::read_to_string(&path);
                text.with_context(|| format!("cannot read {}", path.display()))?.trim().to_owned()
            }
            (None, None) => bail!(
                "no database is named; give --database-url postgres://user:password@host:port/database \
                 or --database-url-file PATH"
            ),
        };
        if !args.admin_listen.ip().is_loopback() {
            bail!("--admin-listen {} is not a loopback address; anybody could read it", args.admin_listen);
        }
        Ok(Self {
            database_url,
            listen: args.listen,
            admin_listen: args.admin_listen,
            state_dir: args.state_dir,
            trust_domain: args.trust_domain,
            name: args.name,
            allow_unsafe_database: args.allow_unsafe_database,
        })
    }
}

fn role(text: &str) -> Result<Role, String> {
    let role = Role::ALL.into_iter().find(|role| role.as_str() == text);
    role.ok_or_else(|| "one of viewer, operator and admin".into())
}
