//! `run`: one command behind a network of its own.
//!
//! Here is what is checked before anything starts. What then runs together, and how it ends, is in
//! `supervise`.

mod exposed;
#[cfg(target_os = "linux")]
mod supervise;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use ipnet::Ipv6Net;

use super::attend::dataplane_name;
use super::treat::{Problems, TreatArgs};
use crate::client::{Connection, Server};
use crate::failure::Failure;
use crate::launch::{DataplaneArgs, Settings, session_url};
use crate::output::text::safe;

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(
    long_about = "Run a command behind a network of its own.\n\n\
        The command gets a network, mount and process namespace, no capability, and your files. Everything \
        it sends goes through a dataplane of its own. In secure mode, what no rule decides is held and \
        asked: at the prompt when stdin is a terminal, and in `vnetctl pending list`.\n\n\
        Exits with the command's status; with 125 if vnetctl itself fails, 126 if the command cannot be \
        executed, 127 if it is not found.",
    after_help = "Examples:\n  vnetctl run -- curl -sS http://192.0.2.7/\n  \
        vnetctl run --secure-mode -- npm install\n  \
        vnetctl run --allow 'tcp 192.0.2.7:443' --allow 'domain *.github.com' -- git fetch\n  \
        vnetctl run --network-policy policy.yaml --vm build --label team=net -- make\n  \
        vnetctl run --socket \"$SSH_AUTH_SOCK\" -- git pull\n  \
        vnetctl run --write . -- make\n  \
        vnetctl run -p 8080:80 -- python3 -m http.server 80"
)]
pub struct RunArgs {
    /// How the command is treated.
    #[command(flatten)]
    pub treat: TreatArgs,
    /// The VM's name [default: the directory's name and a hash of its path]
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "K=V")]
    pub labels: Vec<String>,
    /// Open a port of the host that leads to the command, as `[ADDRESS:]PORT:PORT[/tcp|/udp][+client]`, a range of
    /// them, as 8000-8010:8000-8010, or a Unix socket, as `unix:///PATH:PORT`; may be repeated
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    pub publish: Vec<String>,
    /// Resolver that lookups are forwarded to; may be repeated [default: the host's]
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub dns: Vec<String>,
    /// Let the command connect to the Unix socket that is at this path now; may be repeated
    #[arg(long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,
    /// Let the command write to these files and directories, and to a /tmp, /var/tmp and /dev/shm of its own; all
    /// else is read-only
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub write: Vec<PathBuf>,
    /// MTU of the command's link in bytes, 576 to 65520
    #[arg(long, value_name = "BYTES", default_value_t = MTU_BYTES_DEFAULT)]
    pub mtu: u16,
    /// IPv6 prefix of the command's network, a /64, or off [default: fd00::/64; off where the MTU is below 1280]
    #[arg(long, value_name = "CIDR|off")]
    pub ipv6_prefix: Option<String>,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", last = true, required = true)]
    pub command: Vec<OsString>,
}

/// A run, checked.
#[cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "only Linux has what runs it")
)]
struct Plan {
    /// The VM's name, as wanted.
    vm: String,
    /// The dataplane's name, which nobody else has.
    dataplane: String,
    settings: Settings,
    mtu_bytes: u16,
    /// The prefix of the network that the dataplane makes.
    ipv6: Option<Ipv6Net>,
    sockets: Vec<PathBuf>,
    /// Where alone the command may write, if that is said.
    writable: Option<Vec<PathBuf>>,
    command: Vec<OsString>,
}

/// Runs it; gives the exit code.
///
/// # Errors
/// What is wrong with the options, and what fails to start.
pub fn execute(args: RunArgs, connection: Connection) -> Result<u8, Failure> {
    let plan = plan(args, &connection)?;
    for warning in &plan.settings.treatment.warnings {
        crate::output::say(warning);
    }
    #[cfg(target_os = "linux")]
    return supervise::run(plan, connection);
    #[cfg(not(target_os = "linux"))]
    Err(Failure::Failed(format!(
        "`run` needs Linux's namespaces, so {:?} was not started; serve a Linux VM with `vnetctl up` instead",
        plan.command.first().cloned().unwrap_or_default()
    )))
}

fn plan(args: RunArgs, connection: &Connection) -> Result<Plan, Failure> {
    let mut problems = Problems::default();
    let mut treatment = args.treat.check(&mut problems);
    let writable = writable(&args.write, &mut problems.found);
    if let (Some(policy), Some(document)) = (&args.treat.network_policy, &treatment.document) {
        let warning = exposed::warning(policy, document, writable.as_deref());
        treatment
            .warnings
            .extend(warning.map(|text| safe(&text).into_owned()));
    }
    let vm = match args.vm {
        Some(name) => name,
        None => default_vm_name(&std::env::current_dir().map_err(|e| {
            Failure::Failed(format!(
                "the current directory cannot be told, to name the VM after it: {e} (give --vm NAME)"
            ))
        })?),
    };
    let dataplane = dataplane_name("run")?;
    let settings = Settings {
        args: DataplaneArgs {
            controlplane: Some(session_url(&connection.server()?)),
            name: Some(dataplane.clone()),
            vm: Some(vm.clone()),
            labels: args.labels,
            mtu: Some(args.mtu.to_string()),
            dns: args.dns,
            publish: args.publish,
            ipv6_prefix: args.ipv6_prefix,
            ..DataplaneArgs::default()
        },
        treatment,
        resolver_patience: Some(RESOLVER_PATIENCE),
        ..Settings::default()
    };
    let config = settings.check(true, &mut problems.usage);
    let sockets = sockets(&args.socket, connection, &mut problems.found);
    problems.none()?;
    Ok(Plan {
        vm,
        dataplane,
        settings,
        mtu_bytes: args.mtu,
        ipv6: config.and_then(|config| config.network.ipv6),
        sockets,
        writable,
        command: args.command,
    })
}

/// The real paths of the sockets that are opened. Vnet's own would let the command answer for itself.
fn sockets(paths: &[PathBuf], connection: &Connection, problems: &mut Vec<String>) -> Vec<PathBuf> {
    let mut own = crate::launch::own_directories();
    own.extend(named_sockets(connection));
    let own: Vec<PathBuf> = own.iter().filter_map(|path| path.canonicalize().ok()).collect();
    let mut found = Vec::new();
    for path in paths {
        let shown = path.display();
        match path.canonicalize() {
            Err(error) => problems.push(format!("--socket {shown}: {error}")),
            Ok(real) if own.iter().any(|own| real.starts_with(own)) => problems.push(format!(
                "--socket {shown} is vnet's own, over which the command could answer for itself; open another"
            )),
            Ok(real) if !is_socket(&real) => problems.push(format!(
                "--socket {shown} is not a socket; name the file that a service listens on, or use --write"
            )),
            Ok(real) => found.push(real),
        }
    }
    found
}

/// The sockets of a controlplane that was named with `--server`.
fn named_sockets(connection: &Connection) -> Vec<PathBuf> {
    match &connection.named {
        Some(Server::Unix(path)) => vec![path.clone(), path.with_file_name(crate::launch::SESSION_SOCKET)],
        None => Vec::new(),
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// The real paths of where alone may be written.
fn writable(paths: &[PathBuf], problems: &mut Vec<String>) -> Option<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        let shown = path.display();
        match path.canonicalize() {
            Err(error) => problems.push(format!("--write {shown}: {error}; make it first")),
            Ok(real) if real.parent().is_none() => problems.push(format!(
                "--write {shown} makes nothing read-only; leave the option out, or name directories below"
            )),
            Ok(real) => found.push(real),
        }
    }
    (!paths.is_empty()).then_some(found)
}

/// What of the command's doings is not filtered, in a line.
#[cfg(target_os = "linux")]
fn not_filtered(writable: Option<&[PathBuf]>) -> String {
    match writable {
        None => "not filtered: your files; the command may read and write them (--write PATH makes all else \
                 read-only)"
            .to_owned(),
        Some(writable) => {
            let places: Vec<String> = writable
                .iter()
                .map(|path| crate::output::text::safe(&path.display().to_string()).into_owned())
                .collect();
            format!(
                "not filtered: your files; the command may read them, and write to {} alone",
                places.join(", ")
            )
        }
    }
}

/// A name that the same directory has again tomorrow, and another directory of that name has not.
fn default_vm_name(directory: &Path) -> String {
    let base = directory
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let mut base: String = base
        .chars()
        .map(|c| if fits(c) { c } else { '-' })
        .take(DIRECTORY_NAME_MAX)
        .collect();
    if base.is_empty() {
        base.push_str("root");
    }
    format!("{base}-{:08x}", fnv1a(directory.as_os_str().as_bytes()) as u32)
}

/// FNV-1a, 64 bits (draft-eastlake-fnv §5): the name must be the same in every version of this program,
/// which the standard library's hashers do not promise.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A TAP device takes almost 64 KiB at once, and one large packet costs as much as one small one.
const MTU_BYTES_DEFAULT: u16 = 65_520;
/// What the command's resolver is told to wait for an answer, a person's included.
const RESOLVER_PATIENCE: Duration = Duration::from_secs(30);
/// A VM's name has at most 63 characters; the hash has nine of them.
const DIRECTORY_NAME_MAX: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_names_its_vm_the_same_every_day() {
        assert_eq!(
            default_vm_name(Path::new("/home/ada/web")),
            default_vm_name(Path::new("/home/ada/web"))
        );
        assert_ne!(
            default_vm_name(Path::new("/home/ada/web")),
            default_vm_name(Path::new("/srv/web"))
        );
        assert_eq!(default_vm_name(Path::new("/home/ada/web")), "web-609b580f");
    }

    #[test]
    fn every_directory_gives_a_name_that_a_vm_may_have() {
        for directory in [
            "/",
            "/tmp/a b\u{1b}[2J",
            "/tmp/b\u{fc}cher",
            &format!("/{}", "x".repeat(300)),
        ] {
            let name = default_vm_name(Path::new(directory));
            assert!(name.len() <= 63, "{name}");
            assert!(
                name.chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')),
                "{name}"
            );
        }
        assert!(default_vm_name(Path::new("/")).starts_with("root-"));
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
