//! `PendingService`: lists and answers pending requests.

use tonic::{Request, Response, Status};
use vnet_proto::model::Budget;
use vnet_proto::v1;
use vnet_proto::v1::pending_service_server::PendingService;

use super::{Api, Changes, Keys, actor, is_time_and_id, page, saved, selector, stream};
use crate::approval::Answer;
use crate::convert;
use crate::hub::{PAST_FLOWS_MAX, Reply, Which};
use crate::refusal::Refusal;
use crate::store::EventQuery;

/// Keys of the list's pages.
const KEYS: Keys = Keys {
    list: "pending",
    fits: is_time_and_id,
};

#[tonic::async_trait]
impl PendingService for Api {
    async fn list_pending(
        &self,
        request: Request<v1::ListPendingRequest>,
    ) -> Result<Response<v1::ListPendingResponse>, Status> {
        let request = request.into_inner();
        let requests = self.hub.pending(Which {
            vms: selector(request.vms)?.as_ref(),
            network: &request.network,
        });
        let key = |r: &v1::PendingRequest| {
            let created = r.created_at.unwrap_or_default();
            format!("{:020}.{:09}.{}", created.seconds, created.nanos, r.id)
        };
        let mut requests = requests;
        requests.sort_by_key(key);
        let (requests, next_page_token) = page(requests, request.page_size, &request.page_token, KEYS, key)?;
        Ok(Response::new(v1::ListPendingResponse {
            requests,
            next_page_token,
        }))
    }

    async fn get_pending(
        &self,
        request: Request<v1::GetPendingRequest>,
    ) -> Result<Response<v1::GetPendingResponse>, Status> {
        let (mut found, offers) = self.hub.offers(&request.into_inner().id)?;
        if let Some(mut offers) = offers {
            self.hub.bring_history_up_to_date();
            let query = EventQuery {
                kinds: vec![v1::EventKind::FlowOpened.into(), v1::EventKind::FlowDenied.into()],
                limit: PAST_FLOWS_MAX,
                ..Default::default()
            };
            let past = self.hub.writer().events(query).await.map_err(Refusal::from)?;
            offers.count_past(&past);
            found.options = offers.into_messages();
        }
        Ok(Response::new(v1::GetPendingResponse { request: Some(found) }))
    }

    type WatchPendingStream = Changes<v1::WatchPendingResponse>;

    async fn watch_pending(
        &self,
        request: Request<v1::WatchPendingRequest>,
    ) -> Result<Response<Self::WatchPendingStream>, Status> {
        let watch = self.hub.watch_pending(selector(request.into_inner().vms)?)?;
        let gap = |_| v1::WatchPendingResponse {
            change: v1::PendingChange::Gap.into(),
            request: None,
        };
        Ok(Response::new(stream(watch, gap)))
    }

    async fn approve(
        &self,
        request: Request<v1::ApproveRequest>,
    ) -> Result<Response<v1::ApproveResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let (request, grant, _, durable) = self.hub.reply(&Reply {
            id: &request.id,
            etag: &request.etag,
            answer: Answer::Approve,
            scope: convert::scope_from(request.scope).map_err(Refusal::from)?,
            lifetime: convert::lifetime(request.lifetime).map_err(Refusal::from)?,
            vms: selector(request.vms)?,
            budget: request.budget.map(Into::into).unwrap_or_default(),
            reason: &request.reason,
            lookup_only: request.lookup_only,
            actor: &actor,
        })?;
        saved(durable).await?;
        Ok(Response::new(v1::ApproveResponse {
            request: Some(request),
            grant: Some(grant),
        }))
    }

    async fn deny(&self, request: Request<v1::DenyRequest>) -> Result<Response<v1::DenyResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let (request, grant, ticket, durable) = self.hub.reply(&Reply {
            id: &request.id,
            etag: &request.etag,
            answer: Answer::Deny,
            scope: convert::scope_from(request.scope).map_err(Refusal::from)?,
            lifetime: convert::lifetime(request.lifetime).map_err(Refusal::from)?,
            vms: selector(request.vms)?,
            budget: Budget::default(),
            reason: &request.reason,
            lookup_only: false,
            actor: &actor,
        })?;
        saved(durable).await?;
        let cut = match ticket {
            Some(ticket) => Some(self.hub.report(ticket).await),
            None => None,
        };
        Ok(Response::new(v1::DenyResponse {
            request: Some(request),
            grant: Some(grant),
            cut,
        }))
    }
}
