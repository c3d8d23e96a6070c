//! `forward list|add|remove`: ports and Unix sockets of the host that lead into a guest.

use std::net::IpAddr;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::model::{ForwardListen, ForwardListenError};
use vnet_proto::v1;

use super::Context;
use super::select::vm_name;
use crate::client::{Client, unary};
use crate::failure::Failure;
use crate::launch::ForwardSpec;
use crate::output::{Row, words};

/// Verbs of `forward`.
#[derive(Debug, Subcommand)]
pub enum ForwardCommand {
    /// List forwards
    #[command(after_help = "Examples:\n  vnetctl forward list\n  vnetctl forward list -o json")]
    List(ListArgs),
    /// Open a port or Unix socket of the host that leads into a guest
    #[command(after_help = "Examples:\n  vnetctl forward add 8080:80 --vm web\n  \
        vnetctl forward add 127.0.0.1:5353:192.168.127.2:53/udp\n  vnetctl forward add 0:22 --vm web   # any free port\n  \
        vnetctl forward add 8000-8010:8000-8010    # all of them, or none\n  \
        vnetctl forward add unix:///run/web.sock:80\n  \
        vnetctl forward add 0.0.0.0:80:80+client   # the guest sees who connects")]
    Add(AddArgs),
    /// Close a forward, and cut its flows
    #[command(
        after_help = "Examples:\n  vnetctl forward remove 127.0.0.1:8080\n  vnetctl forward remove 127.0.0.1:5353/udp\n  \
            vnetctl forward remove 127.0.0.1:8000-8010\n  vnetctl forward remove unix:///run/web.sock"
    )]
    Remove(RemoveArgs),
}

/// Arguments of `forward list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only this network's
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Arguments of `forward add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// `[ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp][+client]` or `unix:///PATH:[GUEST:]PORT`; without an address it listens
    /// on 127.0.0.1. PORT may be a range on both sides, as 8000-8010. With `+client` the guest sees a client's own
    /// address, where it has one that is not the host's
    #[arg(value_name = "FORWARD")]
    pub forward: ForwardSpec,
    /// The VM it leads into, where FORWARD names no guest address
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    pub vm: Option<String>,
    /// The network; may be left out where there is only one
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Arguments of `forward remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Where it listens, as 127.0.0.1:8080, 127.0.0.1:5353/udp, 127.0.0.1:8000-8010 or unix:///run/web.sock
    #[arg(value_name = "ADDRESS:PORT[/tcp|/udp]|unix:///PATH", value_parser = listen)]
    pub listen: Listen,
    /// The network; may be left out where there is only one
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

impl ForwardCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(ListArgs { network }) => {
                let request = v1::ListForwardsRequest {
                    network: network.unwrap_or_default(),
                };
                let answer = client
                    .forwards()
                    .list_forwards(unary(request))
                    .await?
                    .into_inner();
                context.output.list(&answer.forwards)
            }
            Self::Add(AddArgs { forward, vm, network }) => {
                let (network, guest) = match forward.guest {
                    Some(guest) => (network, guest),
                    None => {
                        let (home, guest) = guest_address(&client, vm).await?;
                        (network.or(Some(home)), guest)
                    }
                };
                let (first, count) = (forward.first(guest), forward.count);
                let forward = v1::Forward {
                    network: network.unwrap_or_default(),
                    protocol: v1::Protocol::from(first.protocol).into(),
                    listen: first.listen.to_string(),
                    target: first.target.to_string(),
                    keep_client_address: first.keep_client,
                    ..Default::default()
                };
                let request = v1::CreateForwardRequest {
                    forward: Some(forward),
                    count: count.into(),
                };
                let answer = client
                    .forwards()
                    .create_forward(unary(request))
                    .await?
                    .into_inner();
                context.output.done("vnet.v1.CreateForwardResponse", &answer, || {
                    format!(
                        "opened {}",
                        sentence(answer.forward.as_ref(), answer.forwards.len())
                    )
                })
            }
            Self::Remove(RemoveArgs { listen, network }) => {
                let request = v1::DeleteForwardRequest {
                    network: network.unwrap_or_default(),
                    protocol: listen.protocol.into(),
                    listen: listen.first.to_string(),
                    count: listen.count.into(),
                };
                let answer = client
                    .forwards()
                    .delete_forward(unary(request))
                    .await?
                    .into_inner();
                context.output.done("vnet.v1.DeleteForwardResponse", &answer, || {
                    let cut = words::cut(answer.cut.as_ref());
                    format!(
                        "closed {}{cut}",
                        sentence(answer.forward.as_ref(), answer.forwards.len())
                    )
                })
            }
        }
    }
}

/// The network and address of the VM named, or of the only one there is.
async fn guest_address(client: &Client, name: Option<String>) -> Result<(String, IpAddr), Failure> {
    let vm = match name {
        Some(name) => client
            .vms()
            .get_vm(unary(v1::GetVmRequest { name }))
            .await?
            .into_inner()
            .vm
            .unwrap_or_default(),
        None => {
            let mut vms = client
                .vms()
                .list_vms(unary(v1::ListVmsRequest::default()))
                .await?
                .into_inner()
                .vms;
            match (vms.len(), vms.pop()) {
                (1, Some(vm)) => vm,
                (count, _) => {
                    return Err(Failure::Failed(format!(
                        "the forward names no guest address, and there are {count} VMs \
                         (name one with --vm NAME, or write the address as 8080:192.168.127.2:80)"
                    )));
                }
            }
        }
    };
    let address = vm.addresses.iter().find_map(|a| a.parse().ok()).ok_or_else(|| {
        Failure::Failed(format!(
            "{} has no address yet; try again when it has asked for one, or write the guest's address as 8080:192.168.127.2:80",
            crate::output::text::safe(&vm.name)
        ))
    })?;
    Ok((vm.network, address))
}

impl Row for v1::Forward {
    const NAME: &'static str = "vnet.v1.Forward";
    const COLUMNS: &'static [&'static str] = &["NETWORK", "PROTOCOL", "LISTEN", "TARGET", "CLIENT"];

    fn cells(&self, _: SystemTime) -> Vec<String> {
        vec![
            self.network.clone(),
            words::protocol(self.protocol),
            self.listen.clone(),
            self.target.clone(),
            client(self).to_owned(),
        ]
    }
}

/// Whom the guest sees.
fn client(forward: &v1::Forward) -> &'static str {
    if forward.keep_client_address {
        "its own address"
    } else {
        "the gateway"
    }
}

/// One forward, or a range of `count` that begins with it.
fn sentence(forward: Option<&v1::Forward>, count: usize) -> String {
    let forward = forward.cloned().unwrap_or_default();
    let keeps = if forward.keep_client_address {
        ", with the client's address"
    } else {
        ""
    };
    format!(
        "{} {} -> {}{keeps}",
        words::protocol(forward.protocol),
        ports(&forward.listen, count),
        ports(&forward.target, count)
    )
}

/// So many ports from a place on, as `127.0.0.1:8000-8010`.
pub(super) fn ports(first: &str, count: usize) -> String {
    let port = || first.rsplit(':').next()?.parse::<usize>().ok();
    match port() {
        Some(port) if count > 1 => format!("{first}-{}", port + count - 1),
        _ => first.to_owned(),
    }
}

/// Where forwards listen, as `forward remove` is given it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// TCP or UDP.
    pub protocol: v1::Protocol,
    /// Where, or where the first does.
    pub first: ForwardListen,
    /// How many.
    pub count: u16,
}

fn listen(text: &str) -> Result<Listen, String> {
    if text.starts_with("unix://") {
        let first = text
            .parse()
            .map_err(|error: ForwardListenError| error.to_string())?;
        return Ok(Listen {
            protocol: v1::Protocol::Tcp,
            first,
            count: 1,
        });
    }
    let (address, protocol) = match text.rsplit_once('/') {
        Some((address, "udp")) => (address, v1::Protocol::Udp),
        Some((address, "tcp")) => (address, v1::Protocol::Tcp),
        _ => (text, v1::Protocol::Tcp),
    };
    let refused = || {
        format!(
            "{text:?} is not where a forward listens (expected one as 127.0.0.1:8080, [::1]:53/udp, \
             127.0.0.1:8000-8010 or unix:///run/web.sock)"
        )
    };
    // An address has no hyphen.
    let (first, last) = match address.split_once('-') {
        Some((first, last)) => (first, Some(last.parse::<u16>().map_err(|_| refused())?)),
        None => (address, None),
    };
    let first: ForwardListen = first.parse().map_err(|_| refused())?;
    let count = match last {
        None => 1,
        Some(last) => first
            .port()
            .filter(|port| *port != 0)
            .and_then(|port| last.checked_sub(port)?.checked_add(1))
            .ok_or_else(refused)?,
    };
    Ok(Listen {
        protocol,
        first,
        count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_forward_listens_is_an_address_and_ports_or_a_path() {
        for (text, protocol, first, count) in [
            ("127.0.0.1:8080", v1::Protocol::Tcp, "127.0.0.1:8080", 1),
            ("[::1]:53/udp", v1::Protocol::Udp, "[::1]:53", 1),
            ("127.0.0.1:8000-8010", v1::Protocol::Tcp, "127.0.0.1:8000", 11),
            ("[::]:8000-8000/udp", v1::Protocol::Udp, "[::]:8000", 1),
            ("unix:///run/a-b/udp", v1::Protocol::Tcp, "unix:///run/a-b/udp", 1),
        ] {
            let read = listen(text).unwrap();
            assert_eq!(
                (read.protocol, read.first.to_string().as_str(), read.count),
                (protocol, first, count),
                "{text}"
            );
        }
        for text in [
            "8080",
            "127.0.0.1:8010-8000",
            "127.0.0.1:0-5",
            "127.0.0.1:8000-",
            "127.0.0.1:8000-70000",
            "unix://run/a",
        ] {
            assert!(
                listen(text).unwrap_err().contains("expected one as") || text.starts_with("unix"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_range_is_written_as_one() {
        assert_eq!(ports("127.0.0.1:8000", 11), "127.0.0.1:8000-8010");
        assert_eq!(ports("[::1]:80", 1), "[::1]:80");
        assert_eq!(ports("unix:///run/web.sock", 1), "unix:///run/web.sock");
    }
}
