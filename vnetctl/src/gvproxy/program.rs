//! This binary as `gvproxy`: found by the name that it is called by, and run in the order of start-up that gvproxy has.
//!
//! First the command line, then `-version`; the configuration, whole; the log, and the version in it; the pid file; the
//! capture's file; whether the ports of forwards are free; the services' socket; the controlplane, if none answers, and
//! the dataplane, which opens forwards and sockets; forwards over SSH; the notification `ready`, when all of it listens
//! (the peer sends it before). It ends at SIGTERM, SIGINT or SIGHUP with status 0, at whatever fails with 1, and at a
//! wrong command line with 2.

mod attend;
mod front;
mod log;
pub mod notify;
pub mod pid;
pub mod plan;
mod serve;
pub mod words;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::net::{IpAddr, ToSocketAddrs as _};
use std::path::Path;
use std::process::ExitCode;

use super::config::PolicySource;
use super::flags::Flags;
use super::load::{Loaded, load};
use super::origin::Origin;
use super::own::{self, Own};
use super::services::{Token, TokenError};
use crate::client::{Connection, Server};
use crate::cmd::attend::dataplane_name;
use crate::failure::{EXIT_FAILED, Failure, how_to_read, with_causes};
use crate::launch::{DataplaneLog, enough_descriptors, session_url};
use crate::output::text::safe;
use plan::Plan;

/// The name by which this binary is gvproxy.
const NAME: &str = "gvproxy";

/// Whether this binary was called by gvproxy's name, or by one that its builds have, as `gvproxy-linux-amd64`.
pub fn is_called(arguments: &[OsString]) -> bool {
    let name = arguments
        .first()
        .and_then(|program| Path::new(program).file_name());
    name.and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix(NAME))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// The program, from its command line to its exit status.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let program = arguments
        .first()
        .map_or_else(|| NAME.into(), |word| word.to_string_lossy());
    let flags = match Flags::parse(arguments.iter().skip(1).cloned()) {
        Ok(flags) => flags,
        Err(error) => {
            let _ = io::stderr().write_all(error.whole(&safe(&program)).as_bytes());
            return ExitCode::from(error.exit_code());
        }
    };
    if flags.version {
        let said = writeln!(io::stdout(), "{}", version());
        return if said.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(EXIT_FAILED)
        };
    }
    match prepare(&flags) {
        Ok(prepared) => serve::main(prepared),
        Err(failure) => {
            // What a file says of the log may be what is wrong with it.
            log::start_for_both(super::config::LogLevel::Info, flags.log_file.as_deref());
            fatal(&failure)
        }
    }
}

/// The version in the peer's form.
fn version() -> String {
    format!("{NAME} version v{}-vnet", env!("CARGO_PKG_VERSION"))
}

/// Everything that is to be run, read and checked.
#[derive(Debug)]
struct Prepared {
    loaded: Loaded,
    vm: String,
    /// With the dataplane's settings whole, and checked.
    plan: Plan,
    /// What asks for the forwards among them.
    forwards_by: &'static str,
    /// What guests must show for the gateway's API.
    token: Option<Token>,
    connection: Connection,
    /// What names its controlplane, if anything does.
    server_by: Option<Origin>,
}

fn prepare(flags: &Flags) -> Result<Prepared, Failure> {
    let mut loaded = load(flags, &super::dns::host_search_domains())?;
    let default = own::vm_name(&loaded.config);
    let own = Own::load(|name| std::env::var_os(name), &default)
        .map_err(|problems| Failure::Failed(lines(&problems)))?;
    let vm = own.vm.as_ref().map_or(default, |given| given.value.clone());
    let set = std::env::vars_os().map(|(name, _)| name);
    loaded.warnings.extend(own::misspelt(set));
    if let Some(given) = &own.network_policy {
        if loaded.policy.is_none() {
            let source = PolicySource::File(given.value.clone());
            loaded
                .take_policy(&source)
                .map_err(|failure| Failure::Failed(format!("{}: {failure}", given.from)))?;
        } else {
            let text = "the command line or its file has a policy";
            loaded
                .warnings
                .push(format!("warning: {}: not used, as {text}", given.from));
        }
    }
    let mut plan = plan::plan(&loaded.config, loaded.policy.clone(), &own, &vm, &look_up)
        .map_err(|problems| Failure::Failed(lines(&problems)))?;
    let token = match &own.guest_api_token_file {
        Some(given) if plan.settings.args.guest_api => {
            let token = Token::read(&given.value);
            Some(token.map_err(|error| {
                let remedy = match &error {
                    TokenError::Read { source, .. } => how_to_read(source),
                    _ => "",
                };
                Failure::Failed(format!("{}: {}{remedy}", given.from, with_causes(&error)))
            })?)
        }
        _ => None,
    };
    let connection = Connection {
        named: own.server.as_ref().map(|given| -> Server { given.value.clone() }),
    };
    let forwards_by = match flags.config {
        Some(_) => "stack.forwards",
        None => "-ssh-port",
    };
    plan.words.forwards(forwards_by);
    let settings = &mut plan.settings;
    settings.args.name = Some(dataplane_name(NAME)?);
    settings.args.controlplane = Some(session_url(&connection.server()?));
    settings.front = true;
    settings.log = DataplaneLog::Lines {
        directive: log::directive(plan.log_level),
        line: log::relay,
    };
    let mut problems = Vec::new();
    let Some(dataplane) = settings.check(false, &mut problems) else {
        let told: Vec<_> = problems.iter().map(|problem| plan.words.of(problem)).collect();
        return Err(Failure::Failed(told.join("\n  ")));
    };
    enough_descriptors(&dataplane)?;
    Ok(Prepared {
        loaded,
        vm,
        plan,
        forwards_by,
        token,
        connection,
        server_by: own.server.map(|given| given.from),
    })
}

fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    let found = (host, 0).to_socket_addrs()?;
    Ok(found.map(|address| address.ip()).collect())
}

fn lines(problems: &[String]) -> String {
    let lines: Vec<_> = problems.iter().map(|problem| safe(problem)).collect();
    lines.join("\n  ")
}

/// Says why it ends, a line each, in the log.
fn fatal(failure: &Failure) -> ExitCode {
    let text = failure.to_string();
    for line in text.lines() {
        tracing::error!(target: log::FATAL, "{}", line.trim_start());
    }
    ExitCode::from(EXIT_FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_gvproxy_by_its_name() {
        let called = |name: &str| is_called(&[name.into()]);
        assert!(
            called("gvproxy") && called("/usr/libexec/podman/gvproxy") && called("./gvproxy-linux-amd64")
        );
        assert!(!called("vnetctl") && !called("gvproxyd") && !called("/gvproxy/vnetctl"));
        assert!(!is_called(&[]));
    }
}
