//! `FlowService`: lists and closes flows.

use tonic::{Request, Response, Status};
use vnet_proto::v1;
use vnet_proto::v1::flow_service_server::FlowService;

use super::{Api, Changes, Keys, actor, is_number, page, selector, stream};
use crate::hub::Which;

/// Keys of the list's pages.
const KEYS: Keys = Keys {
    list: "flows",
    fits: |key| is_number(key, 20),
};

#[tonic::async_trait]
impl FlowService for Api {
    async fn list_flows(
        &self,
        request: Request<v1::ListFlowsRequest>,
    ) -> Result<Response<v1::ListFlowsResponse>, Status> {
        let request = request.into_inner();
        let flows = self.hub.flows(Which {
            vms: selector(request.vms)?.as_ref(),
            network: &request.network,
        });
        let key = |(number, _): &(u64, v1::Flow)| format!("{:020}", u64::MAX - number);
        let (flows, next_page_token) = page(flows, request.page_size, &request.page_token, KEYS, key)?;
        let flows = flows.into_iter().map(|(_, flow)| flow).collect();
        Ok(Response::new(v1::ListFlowsResponse {
            flows,
            next_page_token,
        }))
    }

    type WatchFlowsStream = Changes<v1::WatchFlowsResponse>;

    async fn watch_flows(
        &self,
        request: Request<v1::WatchFlowsRequest>,
    ) -> Result<Response<Self::WatchFlowsStream>, Status> {
        let watch = self.hub.watch_flows(selector(request.into_inner().vms)?)?;
        let gap = |_| v1::WatchFlowsResponse {
            change: v1::FlowChange::Gap.into(),
            flow: None,
        };
        Ok(Response::new(stream(watch, gap)))
    }

    async fn verify_verdicts(
        &self,
        request: Request<v1::VerifyVerdictsRequest>,
    ) -> Result<Response<v1::VerifyVerdictsResponse>, Status> {
        let request = request.into_inner();
        let vms = selector(request.vms)?;
        let answer = self
            .hub
            .verify_verdicts(vms.as_ref(), request.seed, request.points)
            .await?;
        Ok(Response::new(answer))
    }

    async fn close_flow(
        &self,
        request: Request<v1::CloseFlowRequest>,
    ) -> Result<Response<v1::CloseFlowResponse>, Status> {
        let actor = actor(&request);
        let (flow, ticket) = self.hub.close_flow(&request.into_inner().id, &actor)?;
        Ok(Response::new(v1::CloseFlowResponse {
            flow: Some(flow),
            cut: Some(self.hub.report(ticket).await),
        }))
    }
}
