//! `ForwardService`: ports and Unix sockets of the host that lead into a guest. The dataplane opens and closes
//! them.

use std::net::SocketAddr;

use tonic::{Request, Response, Status};
use vnet_proto::model::{ForwardListen, Protocol, VmId};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;
use vnet_proto::v1::forward_service_server::ForwardService;

use super::Api;
use crate::hub::ForwardWish;
use crate::refusal::Refusal;

#[tonic::async_trait]
impl ForwardService for Api {
    async fn list_forwards(
        &self,
        request: Request<v1::ListForwardsRequest>,
    ) -> Result<Response<v1::ListForwardsResponse>, Status> {
        let forwards = self.hub.forwards(&request.into_inner().network)?;
        Ok(Response::new(v1::ListForwardsResponse { forwards }))
    }

    async fn create_forward(
        &self,
        request: Request<v1::CreateForwardRequest>,
    ) -> Result<Response<v1::CreateForwardResponse>, Status> {
        let request = request.into_inner();
        let forward = request.forward.unwrap_or_default();
        let protocol = check_protocol("forward.protocol", forward.protocol)?;
        let listen = check_listen("forward.listen", &forward.listen)?;
        listen
            .check(protocol)
            .map_err(|error| Refusal::field("forward.protocol", error.to_string()))?;
        let target = check_address("forward.target", &forward.target)?;
        if target.port() == 0 {
            return Err(Refusal::field("forward.target", "port 0 leads nowhere").into());
        }
        let ports = Ports::check("count", protocol, listen, request.count)?;
        let forward = v1::Forward {
            listen: ports.first.to_string(),
            target: target.to_string(),
            // These are for what VMs ask for themselves.
            asked_by: String::new(),
            grant_id: String::new(),
            ..forward
        };
        let network = forward.network.clone();
        let asked = forward.clone();
        let ack = self
            .hub
            .command(&network, |network| {
                let first = v1::Forward {
                    network: network.to_owned(),
                    ..forward
                };
                match ports.count {
                    1 => Command::Expose(first),
                    count => Command::ExposeRange(v1::ForwardRange {
                        first: Some(first),
                        count: count.into(),
                    }),
                }
            })
            .await
            .map_err(|refusal| self.named(refusal, protocol))?;
        let forwards = match ack.forward {
            _ if ports.count > 1 => ack.forwards,
            forward => vec![forward.unwrap_or(asked)],
        };
        Ok(Response::new(v1::CreateForwardResponse {
            forward: forwards.first().cloned(),
            forwards,
        }))
    }

    async fn request_forward(
        &self,
        request: Request<v1::RequestForwardRequest>,
    ) -> Result<Response<v1::RequestForwardResponse>, Status> {
        let request = request.into_inner();
        let forward = request.forward.unwrap_or_default();
        let protocol = check_protocol("forward.protocol", forward.protocol)?;
        let listen = match check_listen("forward.listen", &forward.listen)? {
            ForwardListen::Address(address) => address,
            ForwardListen::Unix(_) => {
                let text = "is a Unix socket, and a VM opens ports alone (expected one as 127.0.0.1:8080)";
                return Err(Refusal::field("forward.listen", text).into());
            }
        };
        let target = check_address("forward.target", &forward.target)?;
        if target.port() == 0 {
            return Err(Refusal::field("forward.target", "port 0 leads nowhere").into());
        }
        if request.any_address && !listen.ip().is_unspecified() {
            let text = format!("{listen} says at which address (expected 0.0.0.0 or [::] with any_address)");
            return Err(Refusal::field("any_address", text).into());
        }
        let wish = ForwardWish {
            network: forward.network,
            vm: request.vm,
            handle: VmId(request.vm_id),
            protocol,
            listen,
            any_address: request.any_address,
            target,
        };
        let opened = self
            .hub
            .request_forward(&wish)
            .await
            .map_err(|refusal| self.named(refusal, protocol))?;
        Ok(Response::new(v1::RequestForwardResponse {
            forward: Some(opened),
        }))
    }

    async fn delete_forward(
        &self,
        request: Request<v1::DeleteForwardRequest>,
    ) -> Result<Response<v1::DeleteForwardResponse>, Status> {
        let request = request.into_inner();
        let protocol = check_protocol("protocol", request.protocol)?;
        let listen = check_listen("listen", &request.listen)?;
        let ports = Ports::check("count", protocol, listen, request.count)?;
        let forwards = self.open_at(&request.network, &ports)?;
        let Some(first) = forwards.first().cloned() else {
            return Err(not_there(&ports.first).into());
        };
        let network = first.network.clone();
        let command = match ports.count {
            1 => Command::Unexpose(first.clone()),
            count => Command::UnexposeRange(v1::ForwardRange {
                first: Some(first.clone()),
                count: count.into(),
            }),
        };
        let ack = self.hub.command(&network, |_| command).await?;
        let cut = v1::CutReport {
            flows: ack.cut_flows,
            dataplanes_acknowledged: 1,
            dataplanes_silent: Vec::new(),
            dataplanes_cut: u32::from(ack.cut_flows > 0),
        };
        Ok(Response::new(v1::DeleteForwardResponse {
            forward: Some(first),
            cut: Some(cut),
            forwards,
        }))
    }
}

impl Api {
    /// The forwards of a range, all of one network.
    fn open_at(&self, network: &str, ports: &Ports) -> Result<Vec<v1::Forward>, Refusal> {
        let open = self.hub.forwards(network)?;
        let mut found: Vec<v1::Forward> = Vec::new();
        for listen in ports.listens() {
            let text = listen.to_string();
            let fits = |f: &&v1::Forward| {
                f.protocol == i32::from(v1::Protocol::from(ports.protocol))
                    && f.listen == text
                    && found.first().is_none_or(|first| first.network == f.network)
            };
            let forward = open.iter().find(fits).ok_or_else(|| not_there(&listen))?;
            found.push(forward.clone());
        }
        Ok(found)
    }

    /// Names the forward of another network that has a port. Its dataplane is but a program to the one that was
    /// asked.
    fn named(&self, refusal: Refusal, protocol: Protocol) -> Refusal {
        let (code, error) = match &refusal {
            Refusal::Dataplane {
                code,
                listen: Some(error),
                ..
            } if error.problem == v1::ListenProblem::InUse && !error.by_own_forward => (*code, error.clone()),
            _ => return refusal,
        };
        let listen = error.listen.parse().ok();
        let Some(other) = listen.as_ref().and_then(|listen| self.other_at(protocol, listen)) else {
            return refusal;
        };
        let elsewhere = match listen {
            Some(ForwardListen::Unix(_)) => "forward from another path",
            _ => "forward another port",
        };
        Refusal::Dataplane {
            code,
            text: format!(
                "{protocol} {} is already in use by network {}'s forward from {} to {}; close it or {elsewhere}",
                error.listen, other.network, other.listen, other.target
            ),
            listen: Some(error),
        }
    }

    fn other_at(&self, protocol: Protocol, listen: &ForwardListen) -> Option<v1::Forward> {
        let protocol = i32::from(v1::Protocol::from(protocol));
        self.hub.forwards("").ok()?.into_iter().find(|other| {
            other.protocol == protocol
                && other
                    .listen
                    .parse::<ForwardListen>()
                    .is_ok_and(|other| other.overlaps(listen))
        })
    }
}

/// Ports, or one place, that a request is about.
struct Ports {
    protocol: Protocol,
    first: ForwardListen,
    count: u16,
}

impl Ports {
    fn check(field: &str, protocol: Protocol, first: ForwardListen, count: u32) -> Result<Self, Refusal> {
        let last = u16::try_from(count.max(1) - 1).ok();
        match last.filter(|last| first.further(*last).is_some()) {
            Some(last) if last < u16::MAX => Ok(Self {
                protocol,
                first,
                count: last + 1,
            }),
            _ => Err(Refusal::field(
                field,
                format!(
                    "{first} has no {count} ports from there on (a range ends at 65535, and port 0 and a Unix socket have none)"
                ),
            )),
        }
    }

    fn listens(&self) -> impl Iterator<Item = ForwardListen> {
        (0..self.count).filter_map(|port| self.first.further(port))
    }
}

fn not_there(listen: &ForwardListen) -> Refusal {
    Refusal::NotFound(format!(
        "no forward listens on {listen}; list them with: vnetctl forward list"
    ))
}

fn check_protocol(field: &str, protocol: i32) -> Result<Protocol, Refusal> {
    match v1::Protocol::try_from(protocol) {
        Ok(v1::Protocol::Tcp) => Ok(Protocol::Tcp),
        Ok(v1::Protocol::Udp) => Ok(Protocol::Udp),
        _ => Err(Refusal::field(field, "is neither TCP nor UDP")),
    }
}

fn check_listen(field: &str, text: &str) -> Result<ForwardListen, Refusal> {
    text.parse()
        .map_err(|error: vnet_proto::model::ForwardListenError| Refusal::field(field, error.to_string()))
}

fn check_address(field: &str, text: &str) -> Result<SocketAddr, Refusal> {
    text.parse().map_err(|_| {
        Refusal::field(
            field,
            format!("{text:?} is not an address and port (expected one as 127.0.0.1:8080)"),
        )
    })
}
