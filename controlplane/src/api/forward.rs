//! `ForwardService`: ports of the host that lead into a guest. The dataplane opens and closes them.

use std::net::SocketAddr;

use tonic::{Request, Response, Status};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;
use vnet_proto::v1::forward_service_server::ForwardService;

use super::Api;
use crate::refusal::Refusal;

#[tonic::async_trait]
impl ForwardService for Api {
    async fn list_forwards(
        &self,
        request: Request<v1::ListForwardsRequest>,
    ) -> Result<Response<v1::ListForwardsResponse>, Status> {
        let forwards = self.hub.forwards(&request.into_inner().network);
        Ok(Response::new(v1::ListForwardsResponse { forwards }))
    }

    async fn create_forward(
        &self,
        request: Request<v1::CreateForwardRequest>,
    ) -> Result<Response<v1::CreateForwardResponse>, Status> {
        let forward = request.into_inner().forward.unwrap_or_default();
        check_protocol("forward.protocol", forward.protocol)?;
        let listen = check_address("forward.listen", &forward.listen)?;
        let target = check_address("forward.target", &forward.target)?;
        if target.port() == 0 {
            return Err(Refusal::field("forward.target", "port 0 leads nowhere").into());
        }
        let forward = v1::Forward {
            listen: listen.to_string(),
            target: target.to_string(),
            ..forward
        };
        let network = forward.network.clone();
        let asked = forward.clone();
        let ack = self
            .hub
            .command(&network, |network| {
                Command::Expose(v1::Forward {
                    network: network.to_owned(),
                    ..forward
                })
            })
            .await?;
        Ok(Response::new(v1::CreateForwardResponse {
            forward: ack.forward.or(Some(asked)),
        }))
    }

    async fn delete_forward(
        &self,
        request: Request<v1::DeleteForwardRequest>,
    ) -> Result<Response<v1::DeleteForwardResponse>, Status> {
        let request = request.into_inner();
        check_protocol("protocol", request.protocol)?;
        let listen = check_address("listen", &request.listen)?.to_string();
        let forward = self
            .hub
            .forwards(&request.network)
            .into_iter()
            .find(|f| f.protocol == request.protocol && f.listen == listen)
            .ok_or_else(|| {
                Refusal::NotFound(format!(
                    "no forward listens on {listen}; list them with: vnetctl forward list"
                ))
            })?;
        let network = forward.network.clone();
        let sent = forward.clone();
        let ack = self.hub.command(&network, |_| Command::Unexpose(sent)).await?;
        let cut = v1::CutReport {
            flows: ack.cut_flows,
            dataplanes_acknowledged: 1,
            dataplanes_silent: Vec::new(),
            dataplanes_cut: u32::from(ack.cut_flows > 0),
        };
        Ok(Response::new(v1::DeleteForwardResponse {
            forward: Some(forward),
            cut: Some(cut),
        }))
    }
}

fn check_protocol(field: &str, protocol: i32) -> Result<(), Refusal> {
    match v1::Protocol::try_from(protocol) {
        Ok(v1::Protocol::Tcp | v1::Protocol::Udp) => Ok(()),
        _ => Err(Refusal::field(field, "is neither TCP nor UDP")),
    }
}

fn check_address(field: &str, text: &str) -> Result<SocketAddr, Refusal> {
    text.parse().map_err(|_| {
        Refusal::field(
            field,
            format!("{text:?} is not an address and port (expected one as 127.0.0.1:8080)"),
        )
    })
}
