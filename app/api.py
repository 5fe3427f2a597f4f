"""The routes that change something, and one account as it stands: parse, call one service, shape the answer."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter, Request, Response
from prometheus_client import Counter
from structlog.contextvars import bind_contextvars

from app import errors, metrics, schemas
from app.booking import Booked
from app.routes import halting, health, history, margin_report
from app.routes.context import PROBLEMS, AccountPath, json_response, services
from app.security import GuardedRoute, caller_of, needs
from app.services import reports
from app.services.trading import Side, TradeOrder, TransferKind, TransferOrder

router = APIRouter(route_class=GuardedRoute)


@cache
def _trades(side: Side, outcome: str) -> Counter:
    """The counter of these labels; to look one up takes prometheus_client longer than to count."""
    return metrics.TRADES.labels(side, outcome)


@router.post(
    "/trade",
    summary="Book a trade",
    tags=["trading"],
    openapi_extra=needs("trade", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TradeAnswer, "description": "Booked"},
        200: {"model": schemas.TradeAnswer, "description": "Booked before under this client_trade_id"},
        **PROBLEMS,
    },
)
async def post_trade(trade: schemas.TradeRequest, request: Request) -> Response:
    """Book a trade. No position is opened or increased without initial margin."""
    outcome = "unavailable"
    bind_contextvars(account_id=trade.account_id)
    try:
        caller_of(request).reach.require(trade.account_id)
        booked = await services(request).booking.book_trade(
            TradeOrder(
                account_id=trade.account_id,
                symbol=trade.symbol,
                side=trade.side,
                quantity=trade.quantity,
                price=trade.price,
            ),
            client_trade_id=trade.client_trade_id,
        )
        outcome = booked.outcome
    except (errors.Refusal, errors.UnknownAccount, errors.InvalidField):
        outcome = "refused"
        raise
    finally:
        _trades(trade.side, outcome).inc()
    return _booked(booked)


@router.get(
    "/positions/{account_id}",
    summary="Show an account and its positions",
    tags=["risk"],
    openapi_extra=needs("read", account_keys=True),
    responses={
        200: {"model": schemas.AccountReport, "description": "The account at the live marks"},
        **{status: PROBLEMS[status] for status in (404, 422, 503)},
    },
)
async def get_positions(account_id: AccountPath, request: Request) -> Response:
    """One account, computed from its record and the live marks."""
    to = services(request)
    bind_contextvars(account_id=account_id)
    caller_of(request).reach.require(account_id)
    try:
        snapshot = await to.booking.read(account_id)
        account = to.booking.parse(snapshot)
    except errors.AccountQuarantined:
        return json_response({**reports.quarantined_summary(account_id), "positions": []})
    contracts = to.booking.contracts
    return json_response(
        reports.account_report(
            account,
            contracts=contracts,
            prices=snapshot.prices(contracts),
            breach=snapshot.breach,
            restore_at=to.settings.restore_at,
        )
    )


@router.post(
    "/mark-price",
    summary="Set a mark price",
    tags=["trading"],
    openapi_extra=needs("mark"),
    responses={200: {"model": schemas.MarkAnswer, "description": "Accepted"}, **PROBLEMS},
)
async def post_mark_price(mark: schemas.MarkRequest, request: Request) -> Response:
    """Set the price at which open positions are valued; every accepted mark is swept."""
    marks = services(request).booking.marks
    return json_response(await marks.set_mark(mark.symbol, mark.price, confirm=mark.confirm))


@router.post(
    "/accounts/{account_id}/deposit",
    summary="Deposit into an account",
    tags=["trading"],
    openapi_extra=needs("operate", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_deposit(account_id: AccountPath, transfer: schemas.TransferRequest, request: Request) -> Response:
    """Add USDT to an account; the first deposit makes the account."""
    return await _transfer("deposit", account_id, transfer, request)


@router.post(
    "/accounts/{account_id}/withdraw",
    summary="Withdraw from an account",
    tags=["trading"],
    openapi_extra=needs("operate", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_withdraw(account_id: AccountPath, transfer: schemas.TransferRequest, request: Request) -> Response:
    """Take USDT out of an account, at most ``min(balance, free margin)``."""
    return await _transfer("withdrawal", account_id, transfer, request)


async def _transfer(
    kind: TransferKind, account_id: str, transfer: schemas.TransferRequest, request: Request
) -> Response:
    bind_contextvars(account_id=account_id)
    caller_of(request).reach.require(account_id)
    return _booked(
        await services(request).booking.book_transfer(
            TransferOrder(account_id=account_id, kind=kind, amount=transfer.amount),
            client_transfer_id=transfer.client_transfer_id,
        )
    )


def _booked(booked: Booked) -> Response:
    if booked.outcome == "replayed":
        return json_response(booked.answer, 200, {"Idempotency-Replayed": "true"})
    return json_response(booked.answer, 201)


ROUTES = [
    route
    for each in (router, *(resource.router for resource in (margin_report, history, halting, health)))
    for route in each.routes
]
"""Every route, side by side and the busiest first: a router within a router is searched twice a request, which costs a
tenth of a trade."""
