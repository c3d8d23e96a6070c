//! From a checked configuration to a running network, until a signal or the end of what it stands on.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::task::JoinSet;
use vnet_proto::model::{ForwardListen, Protocol};

use super::attend::Watch;
use super::front::{self, ServicesSocket, SshTunnels, Tunnels};
use super::notify::{Kind, Notification, Notifier};
use super::pid::PidFile;
use super::plan::Opened;
use super::{Prepared, fatal, log, version};
use crate::cmd::attend::{command_line, has_session};
use crate::cmd::treat::Treatment;
use crate::failure::{Failure, describe, how_to_read, how_to_write, with_causes};
use crate::gvproxy;
use crate::gvproxy::config::Endpoint;
use crate::gvproxy::origin::{Given, Origin};
use crate::gvproxy::services::{GuestApi, Services, ServicesConfig, policy_in_force};
use crate::gvproxy::ssh::{self, IdentityCause, IdentityError, SocketError, Timing};
use crate::launch::{Dataplane, DataplaneError, how_to_listen, look_at_forward, open_pcap};
use crate::output::text::safe;
use crate::signals::Ending;

/// Runs it.
pub(super) fn main(prepared: Prepared) -> ExitCode {
    let config = &prepared.loaded.config;
    let file = config.log_file.as_ref().map(|given| {
        let opened = log::open(&given.value);
        opened.map_err(|error| unwritable(given, "opened", &error))
    });
    let file = match file.transpose() {
        Ok(file) => file,
        Err(failure) => {
            log::start(prepared.plan.log_level, None);
            return fatal(&failure);
        }
    };
    log::start(prepared.plan.log_level, file);
    for warning in prepared.loaded.warnings.iter().chain(&prepared.plan.warnings) {
        tracing::warn!("{}", warning.strip_prefix("warning: ").unwrap_or(warning));
    }
    tracing::info!("{}", version());
    let ended = crate::cli::runtime().and_then(|runtime| runtime.block_on(serve(prepared)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fatal(&failure),
    }
}

/// Why a file that a flag or a key names is none.
fn unwritable(given: &Given<PathBuf>, done: &str, error: &io::Error) -> Failure {
    let path = given.value.display();
    let text = format!(
        "{} {path} cannot be {done}: {error}{}",
        given.from,
        how_to_write(error)
    );
    Failure::Failed(safe(&text).into_owned())
}

/// Why a socket of the front's own is none.
fn unopened(from: Option<&Origin>, at: &Endpoint, error: &io::Error) -> Failure {
    let from = from.map_or_else(|| "-services".to_owned(), ToString::to_string);
    let text = format!("{from} {at} cannot be opened{}: {error}", how_to_listen(error));
    Failure::Failed(safe(&text).into_owned())
}

/// Why a forward over SSH is none: what asks for it, and what helps.
fn unforwarded(from: Option<&Origin>, error: &ssh::ForwardError) -> Failure {
    let from = match (from, &*error.cause) {
        (Some(Origin::Flag(_)), ssh::ForwardCause::Identity(_)) => "-forward-identity".to_owned(),
        (Some(from), _) => from.to_string(),
        (None, _) => "forwards".to_owned(),
    };
    let remedy = match &*error.cause {
        ssh::ForwardCause::Socket(SocketError::Io { source, .. }) => how_to_write(source),
        ssh::ForwardCause::Identity(IdentityError {
            cause: IdentityCause::Read(source),
            ..
        }) => how_to_read(source),
        _ => "",
    };
    let text = format!("{from}: {}{remedy}", with_causes(error));
    Failure::Failed(safe(&text).into_owned())
}

async fn serve(prepared: Prepared) -> Result<(), Failure> {
    let mut signals = Ending::open()?;
    let pid_file = match prepared.loaded.config.pid_file.clone() {
        Some(given) => {
            let written = PidFile::write(given.value.clone());
            Some(written.map_err(|error| unwritable(&given, "written", &error))?)
        }
        None => None,
    };
    let mut dataplane = None;
    // Whatever is under way, a signal ends it, and what it opened goes with it.
    let ended = tokio::select! {
        () = signals.next() => {
            tracing::info!("gvproxy exiting: signal caught");
            Ok(())
        }
        ended = run(prepared, &mut dataplane) => ended,
    };
    if let Some(dataplane) = dataplane {
        dataplane.stop().await;
    }
    drop(pid_file);
    ended
}

async fn run(prepared: Prepared, started_as: &mut Option<Dataplane>) -> Result<(), Failure> {
    let Prepared {
        loaded,
        vm,
        plan,
        forwards_by,
        token,
        connection,
        server_by,
    } = prepared;
    let config = loaded.config;
    let mut settings = plan.settings;
    let name = settings.args.name.clone().unwrap_or_default();
    let policy = in_force(&settings.treatment);
    let is_restricted = settings.treatment.document.is_some() || settings.treatment.mode.is_some();
    let guests = settings.args.guest_api.then_some(GuestApi { token });
    if let Some(Given { value: path, from }) = &config.stack.capture_file {
        let shown = path.display();
        let waiting = || tracing::info!("waiting for a reader of {shown}");
        let stdio = config.interfaces.stdio.as_ref().map(ToString::to_string);
        let opened = open_pcap(path, stdio.as_deref(), waiting).await;
        settings.pcap = Some(
            opened.map_err(|error| Failure::Failed(safe(&format!("{from} {shown} {error}")).into_owned()))?,
        );
    }
    // What cannot be is told in the words that it was asked for in. What takes a port from here on, the dataplane
    // tells.
    for forward in &plan.forwards {
        let protocol = if forward.is_udp {
            Protocol::Udp
        } else {
            Protocol::Tcp
        };
        for at in &forward.listens {
            look_at_forward(protocol, &ForwardListen::Address(*at))
                .map_err(|error| Failure::Failed(format!("{forwards_by}: {}", with_causes(&error))))?;
        }
    }
    // Before the dataplane, which has to know what is closed to guests.
    let socket = match (&plan.services, &config.services) {
        (Some(at), Some(shown)) => {
            let opened = ServicesSocket::open(at);
            Some(opened.map_err(|error| unopened(config.origins.get(shown), shown, &error))?)
        }
        _ => None,
    };
    settings.args.closed = socket.iter().filter_map(|socket| socket.tcp_address).collect();
    // The dataplane needs its sessions' listener from the start on.
    let opened = connection.open().await;
    let client = opened.map_err(|failure| match server_by {
        Some(from) => Failure::Failed(format!("{from}: {failure}")),
        None => failure,
    })?;
    // One that does not answer now may do so later. One that refuses will refuse the dataplane, too.
    if let Err(status) = client.probe().await {
        let why = describe(&status);
        if status.code() == tonic::Code::PermissionDenied {
            let server = connection.server()?;
            return Err(Failure::Failed(format!(
                "the controlplane at {server} refuses: {why}"
            )));
        }
        tracing::warn!("nothing is let out before the controlplane answers: {why}");
    }
    let words = plan.words;
    let in_words = |said: &dyn std::fmt::Display| Failure::Failed(words.of(&said.to_string()));
    let dataplane = Dataplane::start(settings).map_err(|error| in_words(&error))?;
    let dataplane = started_as.insert(dataplane);
    dataplane.listens().await.map_err(|failure| in_words(&failure))?;
    tracing::info!("waiting for clients...");
    for at in &config.listen {
        tracing::info!("listening {at}");
    }

    let front = dataplane.take_front();
    let (sender, requests) = front.ok_or_else(|| Failure::Failed("the dataplane has no front".to_owned()))?;
    let tunnels: Arc<dyn gvproxy::Tunnels> = Arc::new(Tunnels(sender));
    if let Some(at) = &config.services {
        tracing::info!("enabling services API. Listening {at}");
    }
    let services = Services::new(ServicesConfig {
        connection: connection.clone(),
        network: name.clone(),
        gateway_ip: config.stack.gateway_ip,
        gateway_mac: config.stack.gateway_mac,
        static_leases: config.stack.dhcp_static_leases.clone(),
        guests,
        policy_in_force: policy_in_force(connection.clone(), name.clone(), is_restricted),
        tunnels: Arc::clone(&tunnels),
        ssh: Arc::new(SshTunnels(ssh::SshTunnels::new(
            Arc::clone(&tunnels),
            Timing::default(),
        ))),
    });
    for Opened {
        is_udp,
        local,
        remote,
        listens,
    } in &plan.forwards
    {
        services.adopt(*is_udp, local, remote, listens);
    }
    let mut over_ssh = JoinSet::new();
    let sshd = SocketAddr::new(config.stack.device_ip.into(), ssh::PORT_DEFAULT);
    for forward in &config.forwards {
        let tunnels = Arc::clone(&tunnels);
        let bound = ssh::Forward::bind(forward, sshd, tunnels, Timing::default());
        let bound = bound.map_err(|error| {
            unforwarded(
                config.origins.get(&Endpoint::Unix(forward.socket.clone())),
                &error,
            )
        })?;
        over_ssh.spawn(bound.run());
    }
    let serving = front::serve(services, requests, socket);

    let notifier = Notifier::start(config.notification.clone());
    let command = command_line(&connection);
    let mut watch = Watch::start(
        connection.clone(),
        name.clone(),
        command.clone(),
        notifier.clone(),
    );
    let watching = async {
        // Without a session nothing of a guest's would get out.
        has_session(&connection, &name, |why| {
            // The log escapes what needs it.
            tracing::warn!(
                "the dataplane has no session with the controlplane, so nothing is let out: {why}"
            );
        })
        .await;
        watch.begin().await;
        notifier.tell(Notification::new(Kind::Ready));
        tracing::info!(vm, policy, "ready");
        watch.follow().await
    };
    tokio::select! {
        error = dataplane.ended() => match error {
            // The guest of standard input is gone, and no other can come.
            DataplaneError::Ended { status, .. } if status.success() && config.interfaces.stdio.is_some() => Ok(()),
            error => Err(in_words(&error)),
        },
        Err(error) = serving => Err(Failure::Failed(format!("the channel to the dataplane failed: {error}"))),
        Some(ended) = over_ssh.join_next() => Err(Failure::Failed(match ended {
            Ok(Err(error)) => with_causes(&error),
            Ok(Ok(never)) => match never {},
            Err(error) => error.to_string(),
        })),
        never = watching => match never {},
    }
}

/// What its VMs were given, in a word or two: mode, policy. Where nothing was, what the controlplane has for
/// them holds.
fn in_force(treatment: &Treatment) -> String {
    let mode = treatment.mode.map(|mode| format!("mode {mode}"));
    let document = treatment
        .document
        .as_ref()
        .map(|document| document.source.clone());
    let given: Vec<String> = mode.into_iter().chain(document).collect();
    match given.is_empty() {
        true => "none given".to_owned(),
        false => given.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::gvproxy::origin::Place;

    fn key(path: &str) -> Origin {
        Origin::Key {
            path: path.to_owned(),
            place: Place {
                file: "c.yaml".into(),
                line: 2,
                column: 11,
            },
        }
    }

    fn denied() -> io::Error {
        io::Error::from_raw_os_error(libc::EACCES)
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told_as_it_was_named_with_what_helps() {
        let flag = Given::flag("pid-file", PathBuf::from("/root/gv.pid"));
        assert_eq!(
            unwritable(&flag, "written", &denied()).to_string(),
            "-pid-file /root/gv.pid cannot be written: Permission denied (os error 13) (write where this user may)"
        );
        let of_the_file = Given {
            value: PathBuf::from("/root/gv.log"),
            from: key("log-file"),
        };
        assert_eq!(
            unwritable(&of_the_file, "opened", &denied()).to_string(),
            "c.yaml:2:11: log-file /root/gv.log cannot be opened: Permission denied (os error 13) (write where this \
             user may)"
        );
        // What is not the system's error says itself what helps.
        let own = io::Error::other("it is a pipe that nobody reads (start its reader first)");
        assert_eq!(
            unwritable(&flag, "written", &own).to_string(),
            "-pid-file /root/gv.pid cannot be written: it is a pipe that nobody reads (start its reader first)"
        );
    }

    #[test]
    fn a_socket_of_the_services_is_told_as_it_was_named_with_what_helps() {
        let at = Endpoint::Unix(PathBuf::from("/root/s.sock"));
        let told = |from: Option<Origin>| unopened(from.as_ref(), &at, &denied()).to_string();
        let why = "unix:///root/s.sock cannot be opened; listen where this user may: Permission denied (os error 13)";
        assert_eq!(told(Some(Origin::Flag("services"))), format!("-services {why}"));
        assert_eq!(
            told(Some(key("services"))),
            format!("c.yaml:2:11: services {why}")
        );
    }

    #[test]
    fn a_forward_over_ssh_is_told_as_it_was_asked_for_with_what_helps() {
        let told = |from: Origin, cause: ssh::ForwardCause| {
            let error = ssh::ForwardError {
                socket: "/root/f.sock".into(),
                cause: Box::new(cause),
            };
            unforwarded(Some(&from), &error).to_string()
        };
        let flag = || Origin::Flag("forward-sock");
        let socket = || SocketError::Io {
            path: "/root/f.sock".into(),
            step: "bind",
            source: denied(),
        };
        for (from, named) in [
            (flag(), "-forward-sock"),
            (key("forwards[0].socket"), "c.yaml:2:11: forwards[0].socket"),
        ] {
            let text = told(from, socket().into());
            assert!(
                text.starts_with(&format!(
                    "{named}: SSH forward /root/f.sock: listen unix /root/f.sock: bind: "
                )),
                "{text}"
            );
            assert!(text.ends_with(" (write where this user may)"), "{text}");
        }
        let identity = IdentityError {
            path: Path::new("/root/key").to_owned(),
            cause: IdentityCause::Read(denied()),
        };
        assert_eq!(
            told(flag(), identity.into()),
            "-forward-identity: SSH forward /root/f.sock: identity /root/key: cannot be read: Permission denied (os \
             error 13) (let this user read it, or name another)"
        );
    }
}
